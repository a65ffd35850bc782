"""A training that was stopped goes on as if it had not been: the same figures and the same weights, bit for bit."""

import io
import json

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.torch import load_file

from ballast.errors import ConfigError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.run import run
from ballast.pipeline.run_folder import RunFolder
from ballast.pipeline.stages import train, train_sft

pytestmark = pytest.mark.model

ROWS = [
    {"prompt": f"{question} {n}?", "kind": "harmful" if n % 2 else "ordinary", "response": f"{answer} {n}."}
    for n in range(3)
    for question, answer in (("How do I bake bread", "Mix flour with water"), ("What is tea", "A drink of leaves, for"))
]
GRPO = [
    *("train.steps=5", "train.prompts_per_step=2", "train.group_size=2", "train.micro_batch_size=2"),
    *("train.sampling.max_new_tokens=6", "train.lora.r=2", "train.learning_rate=1e-2", "rewards.star=1"),
    *("generation={type: transformers}", "align.enabled=false", "shaping.lagrangian.enabled=true"),
]
SFT = ["sft.epochs=2", "sft.batch_size=2", "sft.micro_batch_size=1", "sft.lora={r: 2, dropout: 0.1}"]
# What differs between two runs of the same training.
CLOCKS = ("time", "step_time", "guard/seconds", "probing/seconds")


class StopError(RuntimeError):
    """The planted end of a process."""


class StoppingFolder(RunFolder):
    """A run folder that ends the process when a step is logged, before the step's checkpoint."""

    stop_at = None

    def log(self, line):
        if line["event"] == "step" and line["step"] == self.stop_at:
            raise StopError
        super().log(line)


@pytest.fixture
def context(tmp_path, tiny_model, tokenizer, monkeypatch):
    tiny_model.save_pretrained(tmp_path / "start")
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    for stage in (train, train_sft):
        monkeypatch.setattr(stage, "check_record", lambda *_: None)

    def make(name, method, *overrides, stop_at=None):
        """A process: it shares nothing but the folder of its name with another."""
        source = json.dumps([str(data)])
        own = [f"out={json.dumps(str(tmp_path))}", f"name={name}", "model.dtype=float32", f"data.train={source}"]
        own += [f"sft.data={source}", *SFT] if method == "sft" else GRPO
        made = RunContext(load_config(method, [*own, *overrides]), Console(file=io.StringIO(), width=500))
        made.start_model, made.tokenizer = str(tmp_path / "start"), tokenizer
        made.guard = ScriptedGuardrail(lambda exchange, prefix: len(prefix) % 10 / 10, "guard")
        made.judge = made.guard
        made.folder = StoppingFolder(made.folder.path)
        made.folder.stop_at = stop_at
        return made

    return make


def go(context, resume=False):
    run(context.config, ["train"], resume=resume, context=context)
    return result(context)


def result(context):
    """Figures of every step, the latest where a step was made twice, and the weights."""
    lines = [json.loads(line) for line in (context.folder.path / "metrics.jsonl").read_text().splitlines()]
    steps = {e["step"]: {k: v for k, v in e.items() if k not in CLOCKS} for e in lines if e["event"] == "step"}
    return steps, load_file(context.folder.stage("train") / "adapter" / "adapter_model.safetensors")


def assert_equal(one, other):
    assert one[0].keys() == other[0].keys()
    for step, figures in one[0].items():
        expected = other[0][step]
        assert {k: (v, expected.get(k)) for k, v in figures.items() if v != expected.get(k)} == {}, step
        assert figures.keys() == expected.keys()
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        assert tensor.equal(other[1][name]), name


def stop(context):
    with pytest.raises(StopError):
        run(context.config, ["train"], context=context)


SAFE = [
    *("regularization.ema_decay=0.5", "regularization.l2_weight=0.1"),
    *("safegrad.enabled=true", "safegrad.every_n_steps=3", "safegrad.batch_size=2", "safegrad.max_rows=4"),
    *("safegrad.max_length=128", "probing.enabled=true", "probing.probe=stale", "probing.max_length=128"),
]


@pytest.mark.parametrize("overrides", [[], SAFE], ids=["plain", "safe"])
@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_a_stopped_training_goes_on_to_the_same_figures_and_weights(context, method, overrides):
    whole = go(context("whole", method, *overrides))
    assert len(whole[0]) == {"grpo": 5, "sft": 6}[method]
    saving = (*overrides, "train.checkpoint_every=2")
    # Stopped in step 4: it goes on after step 2, in the middle of an epoch.
    stop(context("cut", method, *saving, stop_at=4))
    resumed = context("cut", method, *saving)
    assert_equal(go(resumed, resume=True), whole)
    assert "goes on after step 2" in resumed.console.file.getvalue()


def test_a_training_stopped_at_the_end_of_an_epoch_and_stopped_again_goes_on_the_same(context):
    whole = go(context("whole", "sft"))
    stop(context("cut", "sft", "train.checkpoint_every=1", stop_at=4))  # 3 steps an epoch
    with pytest.raises(StopError):
        run((again := context("cut", "sft", "train.checkpoint_every=1", stop_at=6)).config, ["train"], True, again)
    assert_equal(go(context("cut", "sft", "train.checkpoint_every=1"), resume=True), whole)


def test_checkpoints_change_nothing_and_are_gone_when_the_stage_is_done(context):
    plain = go(context("plain", "sft"))
    saving = context("saving", "sft", "train.checkpoint_every=1")
    assert_equal(go(saving), plain)
    made = saving.folder.stage("train")
    assert not (made / "checkpoints").exists()
    assert not (made / "begun.json").exists()
    assert not any("checkpoints" in name or "begun" in name for name in saving.folder.record("train")["outputs"])
    assert set(saving.folder.record("train")["outputs"]) == set(
        (RunFolder(plain_path(saving))).record("train")["outputs"]
    )


def plain_path(context):
    return context.folder.path.with_name("plain")


def test_completions_of_repeated_steps_are_in_the_table_once(context):
    stop(context("cut", "grpo", "train.checkpoint_every=2", stop_at=4))
    resumed = context("cut", "grpo", "train.checkpoint_every=2")
    go(resumed, resume=True)
    table = pq.read_table(resumed.folder.stage("train") / "completions")
    # 5 steps of 2 prompts with 2 completions each
    assert sorted(table.column("step").to_pylist()) == [step for step in range(5) for _ in range(4)]
    record = json.loads((resumed.folder.stage("train") / "training.json").read_text())
    assert record["completions"] == 20


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(context):
    whole = go(context("whole", "sft"))
    stop(context("cut", "sft", "train.checkpoint_every=1", stop_at=5))
    last = context("cut", "sft").folder.path / "train.partial" / "checkpoints" / "step-00000004"
    optimizer = bytearray((last / "optimizer.pt").read_bytes())
    optimizer[len(optimizer) // 2] ^= 1
    (last / "optimizer.pt").write_bytes(optimizer)
    resumed = context("cut", "sft", "train.checkpoint_every=1")
    assert_equal(go(resumed, resume=True), whole)
    shown = resumed.console.file.getvalue()
    assert "warning: checkpoint" in shown
    assert "optimizer.pt is not what was written (sha256)" in shown
    assert "goes on after step 3" in shown


def test_a_training_is_not_gone_on_with_under_other_settings(context):
    stop(context("cut", "sft", "train.checkpoint_every=1", stop_at=3))
    other = context("cut", "sft", "train.checkpoint_every=1", "sft.learning_rate=0.5")
    with pytest.raises(ConfigError, match=r"begun with other settings or inputs \(sft.learning_rate\).*delete"):
        go(other, resume=True)
    assert (other.folder.path / "train.partial" / "checkpoints" / "step-00000002").is_dir()


def test_a_checkpoint_that_cannot_be_written_is_warned_of_and_training_goes_on(context, monkeypatch):
    import torch

    write = torch.save

    def full(what, path, *args, **kwargs):
        if "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        write(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    saving = context("cut", "sft", "train.checkpoint_every=1", stop_at=3)
    stop(saving)
    assert "No space left on device" in saving.console.file.getvalue()
    kept = saving.folder.path / "train.partial" / "checkpoints"
    assert [p.name for p in kept.iterdir()] == ["step-00000001"]
