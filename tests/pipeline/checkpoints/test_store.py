"""Checkpoints appear whole or not at all, are not used when they are damaged, and do not pile up."""

import resource
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ballast.errors import BallastError
from ballast.pipeline.checkpoints import training_state
from ballast.pipeline.checkpoints.callback import CheckpointCallback, _at_border
from ballast.pipeline.checkpoints.manifest import damage, whole_folder
from ballast.pipeline.checkpoints.store import CheckpointError, CheckpointStore


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store whose checkpoints are a small file, named after the trainer."""
    monkeypatch.setattr(training_state, "write_training", lambda name, folder: (folder / "weights").write_text(name))
    warnings = []
    made = CheckpointStore(tmp_path / "checkpoints", warn=warnings.append)
    made.warnings = warnings
    return made


def steps(store):
    return sorted(int(p.name.removeprefix("step-")) for p in store.folder.iterdir())


def test_an_empty_store_has_no_checkpoint(store):
    assert (store.last(), store.last_good(), store.best(), store.at(3)) == (None, None, None, None)


def test_the_last_two_the_last_good_and_the_best_are_kept(store):
    store.save("a", 1, ["best"])
    store.save("b", 2, ["good"])
    for step in (3, 4, 5):
        store.save("c", step)
    assert steps(store) == [1, 2, 4, 5]
    assert (store.last().step, store.last_good().step, store.best().step) == (5, 2, 1)
    store.tag(5, "good", "best")  # then 1 is no longer best, and 2 not the last good
    assert steps(store) == [4, 5]
    assert store.last().tags == {"good", "best"}


def test_steps_are_ordered_as_numbers(store):
    for step in (9, 10, 99_999_999, 100_000_000):
        store.save("a", step)
    assert store.last().step == 100_000_000


def test_a_checkpoint_of_the_same_step_takes_the_place_of_the_former_and_of_its_tags(store):
    store.save("former", 3, ["good"])
    store.save("later", 3)
    assert (store.last().path / "weights").read_text() == "later"
    assert store.last().tags == frozenset()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "weights").write_text("wrighta"), "weights is not what was written"),
        (lambda f: (f / "weights").write_text("weigh"), "weights has 5 bytes instead of 7"),
        (lambda f: (f / "weights").unlink(), "weights is missing"),
        (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "it cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "it cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_one_warning_that_says_what_is_wrong(store, harm, message):
    store.save("weighta", 1, ["good"])
    store.save("weights", 2, ["good"])
    harm(store.folder / "step-00000002")
    assert store.last().step == 1
    assert store.last_good().step == 1
    assert store.at(2) is None
    (warning,) = store.warnings
    assert "step-00000002' is damaged and passed over" in warning
    assert message in warning


def test_a_manifest_with_any_bit_flipped_is_damage(tmp_path):
    with whole_folder(tmp_path / "made") as scratch:
        (scratch / "a").write_text("a")
        (scratch / "weights").write_text("0123456789")
    manifest = tmp_path / "made" / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            manifest.write_bytes(flipped)
            assert damage(tmp_path / "made"), (place, bit, flipped)


@pytest.mark.parametrize("files", ["[]", '["weights"]', '{"weights": []}', '{"weights": null}', "3"])
def test_a_manifest_of_another_shape_is_damage(store, files):
    store.save("weighta", 1)
    store.save("weights", 2)
    (store.folder / "step-00000002" / "manifest.json").write_text(f'{{"files": {files}}}')
    assert store.last().step == 1
    assert "it cannot be read" in store.warnings[0]


def test_one_that_a_killed_process_was_writing_is_none_and_goes_with_the_next(store):
    store.save("a", 1)
    (store.folder / "step-00000002.partial").mkdir()
    (store.folder / "step-00000002.partial" / "weights").write_text("half")
    assert store.last().step == 1
    assert store.warnings == []
    store.save("b", 3)
    assert steps(store) == [1, 3]


def test_a_tag_on_a_checkpoint_that_is_not_there_is_refused(store):
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        store.tag(7, "good")


def test_an_error_of_the_training_itself_is_not_taken_for_one_of_the_disk(store, monkeypatch):
    def wrong(trainer, folder):
        raise RuntimeError("a tensor on another device")

    monkeypatch.setattr(training_state, "write_training", wrong)
    with pytest.raises(RuntimeError, match="another device") as caught:
        store.save("a", 1)
    assert not isinstance(caught.value, BallastError)
    assert steps(store) == []


class Full:
    """A disk that is full at the steps that are in `steps`."""

    def __init__(self):
        self.steps = set()

    def __call__(self, trainer, folder):
        if any(folder.name.startswith(f"step-{step:08d}") for step in self.steps):
            raise OSError(28, "No space left on device")
        (folder / "weights").write_text("made")


@pytest.fixture
def full(store, monkeypatch):
    disk = Full()
    monkeypatch.setattr(training_state, "write_training", disk)
    return disk


def test_the_third_step_in_a_row_that_cannot_be_written_ends_the_training(store, full):
    full.steps = {2, 4, 5, 6}
    # 2 fails and 3 is written, which begins the count anew: 4 and 5 are told of, and 6 is the third.
    assert [store.try_save("a", step) is None for step in range(1, 6)] == [False, True, False, True, True]
    assert [warning.split(" could not")[0] for warning in store.warnings] == [
        f"the checkpoint of step {step}" for step in (2, 4, 5)
    ]
    with pytest.raises(CheckpointError, match="the checkpoint of step 6 could not be written"):
        store.try_save("a", 6)
    assert store.last().step == 3


def test_two_that_try_at_one_step_count_as_one(store, full):
    full.steps = {1, 2, 3}
    assert [store.try_save("a", step, tags) for step in (1, 2) for tags in (["good"], [])] == [None] * 4
    with pytest.raises(CheckpointError):
        store.try_save("a", 3)


def test_tags_that_cannot_be_written_are_an_error_of_the_checkpoint_and_the_best_stays(store, monkeypatch):
    from ballast.pipeline.checkpoints import store as module

    def full(path, text):
        raise OSError(28, "No space left on device")

    store.save("a", 1, ["best"])
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_text", full)
        with pytest.raises(CheckpointError, match=r"step 2 could not be written to '.*tags\.json'.*No space left"):
            store.save("b", 2, ["best"])
        with pytest.raises(CheckpointError, match=r"step 1 could not be written to '.*tags\.json'"):
            store.tag(1, "good")
    assert (store.best().step, store.last().step) == (1, 2)


def test_a_failure_between_two_tags_leaves_a_best(store, monkeypatch):
    from ballast.pipeline.checkpoints import store as module

    def full_for_the_first(path, text):
        if path.parent.name == "step-00000001":
            raise OSError(28, "No space left on device")
        path.write_text(text)

    store.save("a", 1, ["best"])
    monkeypatch.setattr(module, "write_text", full_for_the_first)
    with pytest.raises(CheckpointError):
        store.save("b", 2, ["best"])
    assert store.best().step == 2


def test_a_folder_that_cannot_be_made_is_refused_with_the_reason_and_the_remedy(tmp_path, store):
    store.folder.write_text("a file is in the way")
    with pytest.raises(
        CheckpointError, match=r"step 1 could not be written.*Error.*make room on the disk or give write"
    ):
        store.save("a", 1)


def test_a_manifest_covers_folders_within(tmp_path):
    with whole_folder(tmp_path / "made") as scratch:
        (scratch / "within").mkdir()
        (scratch / "within" / "file").write_text("a")
    assert damage(tmp_path / "made") is None
    (tmp_path / "made" / "within" / "file").write_text("b")
    assert "within/file" in (damage(tmp_path / "made") or "")


class Counter(TrainerCallback):
    """Counts steps, as a callback with a state of its own."""

    def __init__(self) -> None:
        self.steps = 0
        self.noted: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def checkpoint_state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def restore_checkpoint_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Other(Counter):
    """Another one, that is left alone."""


@pytest.fixture
def trainer(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    rows = [{"input_ids": [n, n + 1, n + 2], "labels": [n, n + 1, n + 2]} for n in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=1,
        max_steps=4,
        learning_rate=0.1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Counter(), Other()])


def snapshot(trainer):
    moments = [value.clone() for state in trainer.optimizer.state.values() for value in state.values()]
    return [p.detach().clone() for p in trainer.model.parameters()], moments, trainer.lr_scheduler.get_last_lr()


class TurnsBack(TrainerCallback):
    """Saves after step 2, and turns back to it after step 3."""

    def __init__(self, trainer: Any, store: CheckpointStore) -> None:
        self.trainer, self.store = trainer, store

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        counter, other = (c for c in self.trainer.callback_handler.callbacks if isinstance(c, Counter))
        if state.global_step == 2:
            state.stateful_callbacks["price"] = {"args": {}, "attributes": {"value": 1.5}}
            self.then = snapshot(self.trainer)
            self.store.save(self.trainer, 2, ["good"])
        if state.global_step == 3:
            state.stateful_callbacks["price"] = {"args": {}, "attributes": {"value": 9.0}}
            before = snapshot(self.trainer)
            self.store.load(self.trainer, self.store.last_good(), leave=[other])
            self.differed = not before[0][0].equal(self.then[0][0])
            self.now = snapshot(self.trainer)
            self.counts = (counter.steps, other.steps, state.global_step, state.stateful_callbacks["price"])


def test_turning_back_restores_all_but_the_steps_and_the_callbacks_that_are_left_alone(trainer, tmp_path):
    turns = TurnsBack(trainer, CheckpointStore(tmp_path / "checkpoints"))
    trainer.add_callback(turns)
    trainer.train()
    assert turns.differed
    for then, now in zip(turns.then[:2], turns.now[:2], strict=True):
        assert all(a.equal(b) for a, b in zip(then, now, strict=True))
    assert turns.then[2] == turns.now[2]
    assert turns.counts == (2, 3, 3, {"args": {}, "attributes": {"value": 1.5}})
    assert trainer.state.global_step == 4  # training went on


def test_a_checkpoint_holds_no_pickle_but_what_weights_only_reads(trainer, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    trainer.train()
    folder = store.save(trainer, 4).path
    names = {p.name for p in folder.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "parts.pt"} <= names
    assert not any(name.endswith(".bin") for name in names)


@pytest.mark.parametrize("limit", [2_000, 12_000])
def test_a_disk_that_is_full_leaves_the_former_checkpoint_whole(trainer, tmp_path, limit):
    """A limit on the size of files ends a write half-way: of the weights (about 14 kB), or of the optimizer (twice that)."""
    store = CheckpointStore(tmp_path / "checkpoints")
    trainer.train()
    store.save(trainer, 4, ["good"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match="the checkpoint of step 5 could not be written"):
            store.save(trainer, 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.last().step == 4
    assert store.last_good().step == 4
    assert steps(store) == [4]
    assert store.save(trainer, 5).step == 5  # with room again


@pytest.mark.parametrize("pages", [0, 5])
def test_on_a_small_disk_that_is_full_the_former_checkpoint_stays_and_the_next_one_is_made_with_room(
    trainer, small_disk, pages
):
    """Full at the first file, and half-way: a checkpoint takes 14 pages or more."""
    store = CheckpointStore(small_disk.path / "checkpoints")
    trainer.train()
    store.save(trainer, 4, ["good"])
    small_disk.fill(leave=4096 * pages)
    with pytest.raises(CheckpointError, match=r"to '.*step-00000005' \(.*make room on the disk .* --resume"):
        store.save(trainer, 5)
    assert (steps(store), store.last_good().step) == ([4], 4)
    small_disk.make_room()
    assert store.save(trainer, 5).step == 5


def test_on_a_disk_that_may_not_be_written_the_former_checkpoint_can_be_gone_back_to(trainer, small_disk):
    store = CheckpointStore(small_disk.path / "checkpoints")
    trainer.train()
    store.save(trainer, 4, ["good"])
    small_disk.make_read_only()
    with pytest.raises(CheckpointError, match=r"step-00000005' \(.*Read-only file system.*give write permission"):
        store.save(trainer, 5)
    with pytest.raises(CheckpointError, match=r"tags\.json' \(.*Read-only file system"):
        store.tag(4, "best")
    store.load(trainer, store.last_good())


def test_grpo_is_saved_when_its_completions_are_used_up():
    # 4 micro-batches a generation, used twice, with 2 micro-batches a step: 4 * 2 / 2 = every 4th step.
    arguments = SimpleNamespace(steps_per_generation=4, num_iterations=2, gradient_accumulation_steps=2)
    assert [step for step in range(1, 13) if _at_border(arguments, step)] == [4, 8, 12]
    assert all(_at_border(SimpleNamespace(), step) for step in range(1, 5))


def test_it_saves_every_n_steps_however_rarely_the_trainer_logs(trainer, tmp_path):
    trainer.args.logging_steps = 500
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    trainer.add_callback(CheckpointCallback(store, trainer, every=1))
    trainer.train()
    assert steps(store) == [1, 2, 3]  # the last step's is of no use


class SavesItself(TrainerCallback):
    """Saves at step 2, as a monitor does at a good point."""

    def __init__(self, trainer: Any, store: CheckpointStore) -> None:
        self.trainer, self.store = trainer, store

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.store.save(self.trainer, 2, ["good"])


def test_a_step_that_another_has_saved_is_done(trainer, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    trainer.add_callback(SavesItself(trainer, store))
    trainer.add_callback(CheckpointCallback(store, trainer, every=2))
    trainer.train()
    assert steps(store) == [2]  # and not 3 in its place
    assert store.last().tags == {"good"}
