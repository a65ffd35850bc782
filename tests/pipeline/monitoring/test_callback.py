"""SafetyMonitor in a training: what it measures, and what it does when safety falls."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ballast.errors import BallastError, ConfigError, DataError, GuardError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline.checkpoints.callback import CheckpointCallback
from ballast.pipeline.checkpoints.store import CheckpointError, CheckpointStore
from ballast.pipeline.config_inputs import SamplingConfig
from ballast.pipeline.evaluation.judges import Completion, Verdict
from ballast.pipeline.evaluation.suites import SuitePrompt
from ballast.pipeline.monitoring.answers import Measured
from ballast.pipeline.monitoring.callback import SafetyMonitor
from ballast.pipeline.monitoring.history import history_lines

pytestmark = pytest.mark.model

SUITE = [SuitePrompt(f"h{i}", f"Harmful request {i}", "harmful") for i in range(30)]
SUITE += [SuitePrompt(f"o{i}", f"Ordinary request {i}", "ordinary") for i in range(4)]
BASE, FALLEN, UNSURE, FLOOR = 0.1, 0.17, "unsure", "floor"  # .17 everywhere: .83 / .9 = .922, p near 2**-30
JUDGE = ScriptedGuardrail(lambda exchange, prefix: 0.1, "judge")


class Scripted:
    """A measurement that plays the risk of every harmful prompt, one entry a call; the last one goes on."""

    sampling, threshold = SamplingConfig(), 0.5

    def __init__(self, *script, coherent=()):
        self.script, self.coherent, self.calls = script, coherent, []

    def __call__(self, model, seed, when):
        n = len(self.calls)
        self.calls.append((seed, when))
        said = self.script[min(n, len(self.script) - 1)]
        # unsure: 2 of 30 at .9, so (.9 * 28 + .1 * 2) / 30 = .847 = .941 of .9; floor: 6 of 30, .74 = .822 of it
        risky = {UNSURE: 2, FLOOR: 6}.get(said, 0)
        readable = self.coherent[min(n, len(self.coherent) - 1)] if self.coherent else True
        verdicts, completions = [], []
        for i, prompt in enumerate(SUITE):
            risk = 0.9 if i < risky else BASE if isinstance(said, str) else said
            verdicts.append(
                Verdict(prompt.id, prompt.kind, 0, False, risk, risk is not None and risk >= 0.5, False, readable)
            )
            completions.append(Completion(prompt.id, prompt.prompt, prompt.kind, "answer"))
        return Measured(tuple(completions), tuple(verdicts), 0.0)


@pytest.fixture
def trainer(tiny_model, tokenizer, tmp_path):
    def make(steps=4, callbacks=(), **options):
        rows = [{"input_ids": list(range(20 + i, 36 + i)), "completion_mask": [0] * 4 + [1] * 12} for i in range(40)]
        args = SFTConfig(
            output_dir=str(tmp_path / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            completion_only_loss=True,
            **options,
        )
        torch.manual_seed(0)  # of the adapter: every trainer of a test begins with the same one
        made = SFTTrainer(
            copy.deepcopy(tiny_model),
            args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
            callbacks=list(callbacks),
        )
        for printer in (PrinterCallback, ProgressCallback):
            made.remove_callback(printer)
        return made

    return make


def monitor_of(tmp_path, *script, coherent=(), **options):
    options = {"every_n_steps": 1, "cooldown": 0} | options
    return SafetyMonitor(SUITE, JUDGE, tmp_path / "monitor", measure=Scripted(*script, coherent=coherent), **options)


def trained(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def kinds(monitor):
    return [event["event"].removeprefix("monitor_") for event in monitor.events]


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


def test_a_training_that_is_only_watched_ends_with_the_same_weights(trainer, tmp_path):
    alone, watched = trainer(), trainer()
    alone.train()
    options = {"sampling": SamplingConfig(max_new_tokens=3), "every_n_steps": 2}
    monitor = SafetyMonitor(SUITE[:3] + SUITE[-1:], JUDGE, tmp_path / "monitor", **options).watch(watched)
    watched.train()
    assert kinds(monitor) == ["baseline", "monitor", "monitor"]
    assert same(trained(alone), trained(watched))


def test_it_measures_before_every_n_steps_and_after_the_last(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE, every_n_steps=2)
    run = trainer(steps=5)
    monitor.watch(run)
    run.train()
    assert [event["step"] for event in monitor.events] == [0, 2, 4, 5]
    assert [event.get("outcome") for event in monitor.events] == [None, "good", "good", "good"]
    assert monitor.rule.evaluations == 3
    figures = monitor.events[-1]["figures"]
    assert figures["safety"]["value"] == pytest.approx(0.9)
    assert figures["utility"]["value"] == 1.0
    assert set(figures["safety"]) >= {"low", "high", "n"}


def test_a_trip_turns_back_to_the_last_good_point_and_halves_the_rate(trainer, tmp_path):
    # baseline, step 1 good, step 2 fallen, then good again
    monitor = monitor_of(tmp_path, BASE, BASE, FALLEN, BASE)
    seen = {}

    class Weights(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen[state.global_step] = (
                {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
                optimizer.param_groups[0]["lr"],
            )

    run = trainer(steps=4, callbacks=[Weights()])
    monitor.watch(run)
    run.train()
    assert kinds(monitor) == ["baseline", "monitor", "monitor", "trip", "rollback", "lower_lr", "monitor", "monitor"]
    assert monitor.events[4]["to_step"] == 1
    assert same(seen[1][0], seen[2][0])  # what step 3 began from is what step 2 began from
    assert not same(seen[2][0], seen[3][0])
    assert (seen[1][1], seen[2][1], seen[3][1]) == pytest.approx((1e-2, 5e-3, 5e-3))
    assert run.state.global_step == 4


def test_a_trip_at_the_last_step_leaves_the_good_weights_in_the_model(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE, FALLEN)
    run = trainer(steps=2)
    before = trained(run)
    monitor.every_n_steps = 2
    monitor.watch(run)
    run.train()
    assert kinds(monitor)[-3:] == ["trip", "rollback", "lower_lr"]
    assert same(before, trained(run))


def test_after_the_last_allowed_trip_one_more_ends_the_training_at_the_good_point(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE, FALLEN, max_trips=1)
    run = trainer(steps=9)
    before = trained(run)
    monitor.watch(run)
    run.train()
    assert (monitor.trips, monitor.stopped, run.state.global_step) == (2, True, 2)
    assert same(before, trained(run))


def test_stop_ends_the_training_at_the_first_trip(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE, FALLEN, action="stop")
    run = trainer(steps=9)
    monitor.watch(run)
    run.train()
    assert (monitor.stopped, run.state.global_step) == (True, 1)
    assert [e["action"] for e in monitor.events if e["event"] == "monitor_trip"] == ["stop"]


def test_the_safest_good_point_is_the_best_and_is_what_too_many_trips_end_with(trainer, tmp_path):
    # Good with risks .08, .05 and .09 at the steps 1 to 3, then fallen for good: back to 3, and one trip more ends it at 2.
    monitor = monitor_of(tmp_path, BASE, 0.08, 0.05, 0.09, FALLEN, max_trips=1)
    seen = {}

    class Weights(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    run = trainer(steps=9, callbacks=[Weights()])
    monitor.watch(run)
    run.train()
    assert [e["to_step"] for e in monitor.events if e["event"] == "monitor_rollback"] == [3, 2]
    assert same(seen[2], trained(run))
    assert monitor.store.best().step == 2


def test_a_stop_is_not_undone_by_a_kill_and_a_resume(trainer, tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    monitor = monitor_of(tmp_path, BASE, FALLEN, action="stop", every_n_steps=2, store=store)
    run = trainer(steps=9)
    monitor.watch(run)
    run.add_callback(CheckpointCallback(store, run, every=1))
    run.train()
    assert (monitor.stopped, run.state.global_step) == (True, 2)
    # Killed before its model was written, it goes on from step 1, and is stopped again.
    last = store.last()
    assert last.step == 1
    again, resumed = monitor_of(tmp_path, FALLEN, action="stop", every_n_steps=2, store=store), trainer(steps=9)
    again.watch(resumed)
    resumed.add_callback(CheckpointCallback(store, resumed, every=1, resumed=last))
    resumed.train(resume_from_checkpoint=str(last.path))
    assert (again.stopped, resumed.state.global_step) == (True, 2)
    assert same(trained(run), trained(resumed))


def test_reduce_lr_goes_on_with_the_weights_it_has_and_needs_no_trainer(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE, FALLEN, BASE, action="reduce_lr")
    run = trainer(steps=2, callbacks=[monitor])
    run.train()
    assert kinds(monitor) == ["baseline", "monitor", "trip", "lower_lr", "monitor"]
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)


def test_a_fall_that_a_second_sample_does_not_confirm_lowers_the_rate_only(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE, UNSURE)
    run = trainer(steps=1)
    monitor.watch(run)
    run.train()
    # both samples: 3**-2 = .11, below .25 / 1 evaluation
    assert kinds(monitor) == ["baseline", "monitor", "lower_lr"]
    (_, first, second) = monitor.measure.calls
    assert first[0] != second[0]  # another seed: the same answers would confirm themselves


def test_a_fall_that_chance_may_make_changes_nothing_and_is_no_good_point_to_go_back_to(trainer, tmp_path):
    # step 1 unsure on both samples (.11 is above .05 / 2 evaluations), step 2 fallen: back to step 0, not to step 1
    monitor = monitor_of(tmp_path, BASE, UNSURE, UNSURE, FALLEN, false_lowerings=0.05)
    run = trainer(steps=2)
    monitor.watch(run)
    run.train()
    assert kinds(monitor) == ["baseline", "monitor", "monitor", "trip", "rollback", "lower_lr"]
    assert [event.get("outcome") for event in monitor.events[1:3]] == ["unsure", "trip"]
    assert monitor.events[4]["to_step"] == 0


def test_in_the_cool_down_the_hard_floor_alone_trips(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE, FALLEN, FALLEN, FLOOR, cooldown=2, max_trips=5)
    run = trainer(steps=3)
    monitor.watch(run)
    run.train()
    tripped = [event["step"] for event in monitor.events if event["event"] == "monitor_trip"]
    assert tripped == [1, 3]
    assert [e["cooling_down"] for e in monitor.events if e["event"] == "monitor"] == [False, True, True]


def test_a_model_that_lost_its_language_trips_although_the_judge_calls_it_safe(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE, coherent=(True, False), action="stop")
    run = trainer(steps=3)
    monitor.watch(run)
    run.train()
    assert monitor.stopped
    assert "readable" in next(e["reason"] for e in monitor.events if e["event"] == "monitor_trip")


def test_a_trip_names_what_flipped_and_what_was_trained_on_since_the_good_point(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE, BASE, FLOOR, FLOOR, BASE)
    run = trainer(steps=3)
    monitor.watch(run)
    run.train()
    trip = next(event for event in monitor.events if event["event"] == "monitor_trip")
    assert sorted(trip["flipped"]) == [f"h{i}" for i in range(6)]
    folder = tmp_path / "monitor"
    lines = [json.loads(line) for line in (folder / f"{trip['review']}-flipped.jsonl").read_text().splitlines()]
    assert lines[0] | {"id": ""} == {
        "id": "",
        "risk_before": 0.1,
        "risk_now": 0.9,
        "prompt": lines[0]["prompt"],
        "answers": ["answer"],
    }
    rows = [json.loads(line) for line in (folder / f"{trip['review']}-rows.jsonl").read_text().splitlines()]
    assert len(rows) == trip["rows"]
    assert 2 <= len(rows) <= 4  # the step since the good point had 2, and the loader is one batch ahead
    assert all(row["text"] for row in rows)


def test_the_report_tells_every_trip_and_what_was_done(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE, BASE, FALLEN, BASE)
    run = trainer(steps=3)
    monitor.watch(run)
    run.train()
    first, trip, back, rate = history_lines(tmp_path / "monitor")
    assert first == "monitor: 2 of 3 evaluations good"
    assert "tripped at step 2" in trip
    assert back == "monitor: at step 2 back to the weights of step 1"
    assert rate.endswith("0.5 of the configured one")
    assert history_lines(tmp_path / "another") == []


def test_without_a_whole_good_checkpoint_a_trip_ends_in_an_error(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE, FALLEN)
    run = trainer(steps=2)
    monitor.watch(run)
    for_real = monitor.store.try_save

    def damaged(*args):
        checkpoint = for_real(*args)
        (checkpoint.path / "optimizer.pt").write_bytes(b"")
        return checkpoint

    monitor.store.try_save = damaged
    with pytest.raises(BallastError, match="no whole checkpoint of a good point"):
        run.train()


def test_good_points_that_cannot_be_written_are_warned_of_until_the_third_in_a_row(
    trainer, tmp_path, monkeypatch, caplog
):
    from ballast.pipeline.checkpoints import training_state

    def full(trainer, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_state, "write_training", full)
    monitor = monitor_of(tmp_path, BASE)
    run = trainer(steps=9)
    monitor.watch(run)
    with pytest.raises(CheckpointError, match="step 2 could not be written"):
        run.train()
    warned = [record.getMessage() for record in caplog.records if "could not be written" in record.getMessage()]
    assert [message.split(" could not")[0] for message in warned] == [
        "the checkpoint of step 0",
        "the checkpoint of step 1",
    ]
    # What was trained on since the last point that can be gone back to is still known: 2 steps of 2 rows, and one batch more.
    assert 4 <= monitor._good.write_rows(tmp_path / "rows.jsonl") <= 6


def test_rollback_is_refused_for_a_monitor_that_was_not_given_the_trainer(trainer, tmp_path):
    run = trainer(callbacks=[monitor_of(tmp_path, BASE)])
    with pytest.raises(ConfigError, match=r"watch\(trainer\)"):
        run.train()


def test_the_guard_that_rewards_is_refused_as_judge_unless_told_so(tmp_path):
    reward = ScriptedGuardrail({}, "judge")
    with pytest.raises(ConfigError, match="please its guard"):
        SafetyMonitor(SUITE, JUDGE, tmp_path, reward_guard=reward)
    SafetyMonitor(SUITE, JUDGE, tmp_path, reward_guard=reward, allow_same_guard=True)
    SafetyMonitor(SUITE, JUDGE, tmp_path, reward_guard=ScriptedGuardrail({}, "other"))


def test_a_judge_that_does_not_answer_stops_the_training_instead_of_passing(trainer, tmp_path):
    silent = ScriptedGuardrail(lambda exchange, prefix: None, "silent")
    run = trainer(steps=2)
    SafetyMonitor(SUITE[:4], silent, tmp_path / "m", sampling=SamplingConfig(max_new_tokens=3)).watch(run)
    with pytest.raises(GuardError, match="in the monitor's suite before training"):
        run.train()


def test_a_baseline_without_a_scored_harmful_answer_is_refused_before_training(trainer, tmp_path):
    monitor = monitor_of(tmp_path, None)
    run = trainer(steps=2)
    monitor.watch(run)
    with pytest.raises(DataError, match="no scored answer to a harmful prompt"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize(
    "option",
    [
        {"action": "restart"},
        {"lr_factor": 0.0},
        {"cooldown": -1},
        {"every_n_steps": 0},
        {"max_trips": -1},
        {"samples": 0},
        {"samples": 5},
    ],
)
def test_options_out_of_range_are_refused(tmp_path, option):
    with pytest.raises(ConfigError, match="SafetyMonitor"):
        SafetyMonitor(SUITE, JUDGE, tmp_path, **option)


def test_a_resumed_training_goes_on_with_baseline_trips_and_rate(trainer, tmp_path):
    first = monitor_of(tmp_path, BASE, FALLEN, BASE)
    run = trainer(steps=3)
    first.watch(run)
    run.train()
    second = monitor_of(tmp_path, BASE)
    second.restore_checkpoint_state(first.checkpoint_state())
    assert second.checkpoint_state() == first.checkpoint_state()
    assert (second.trips, second._rate.scale) == (1, 0.5)


def test_a_resumed_training_that_was_not_monitored_is_refused(trainer, tmp_path):
    monitor = monitor_of(tmp_path, BASE)
    run = trainer(steps=2)
    monitor.watch(run)
    run.state.global_step = 1
    monitor.on_train_begin(run.args, run.state, run.control, lr_scheduler=None)
    with pytest.raises(ConfigError, match="without its baseline"):
        monitor.on_step_begin(run.args, run.state, run.control)
