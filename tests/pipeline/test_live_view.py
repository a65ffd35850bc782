"""The table of a training: it shows what is on record, and only where there is a terminal to draw it in."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.live_view import LiveTable, Pace
from ballast.pipeline.training.callbacks import MetricsCallback

STEP = {
    "event": "step",
    "stage": "train",
    "step": 4,
    "steps": 10,
    "loss": 0.5,
    "reward/total": 0.25,
    "risk/mean": 0.125,
}
MEASURED = {"event": "monitor", "stage": "train", "step": 4, "safety": 0.81, "relative": 0.9, "reason": "below [x]"}


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def table(clock):
    return LiveTable("train", clock)


def drawn(table):
    console = Console(record=True, file=io.StringIO(), width=80)
    console.print(table)
    return console.export_text()


def test_before_the_first_step_there_is_a_table_already(table):
    assert table.cells() == {"step": "-", "time": "0 s", "left": "-"}
    assert "step" in drawn(table)


def test_a_step_shows_its_figures_and_the_time_left_at_the_pace_so_far(table, clock):
    clock.now = 140.0
    table.read({**STEP, "risk/violation_rate": 0.5, "risk/unscored_share": 0.0, "reward": 9.0})
    clock.now = 150.0
    # 4 steps in 40 s, so the other 6 take 60 s, of which 10 have gone
    assert table.cells() == {
        "step": "4/10",
        "loss": "0.5",
        "reward": "0.25",
        "risk": "0.125",
        "unsafe": "0.5",
        "unscored": "0",
        "time": "50 s",
        "left": "50 s",
    }


def test_an_unscored_step_has_no_risk_rather_than_0_or_that_of_the_step_before(table):
    table.read(STEP)
    table.read({**STEP, "step": 5, "risk/mean": None})
    assert table.cells()["risk"] == "-"


def test_tokens_a_second_are_those_between_the_steps_seen(table, clock):
    # The count of a resumed training begins with the tokens of the process before.
    table.read({**STEP, "num_tokens": 5_000})
    assert "tokens/s" not in table.cells()
    clock.now += 20
    table.read({**STEP, "step": 5, "num_tokens": 5_600})
    assert table.cells()["tokens/s"] == "30"


def test_the_time_left_of_a_resumed_training_is_by_its_own_steps(table, clock):
    clock.now = 110.0
    table.read({"event": "training_resumed", "stage": "train", "step": 6})
    clock.now = 114.0
    table.read({**STEP, "step": 8})
    assert table.cells()["left"] == "4 s"  # 2 steps in 4 s, and 2 are left
    assert Pace(6, 110.0).left(8, 10, 114.0) == pytest.approx(4.0)


def test_the_monitor_shows_safety_against_its_baseline_rollbacks_and_the_last_event(table):
    table.read({"event": "monitor_baseline", "stage": "train", "step": 0, "figures": {"safety": {"value": 0.9}}})
    assert table.cells()["safety"] == "0.900, the baseline"
    table.read(MEASURED)
    assert table.cells()["safety"] == "0.810, 90% of the baseline"
    assert "last: step 4: below [x]" in drawn(table)  # brackets are no markup
    table.read({"event": "monitor_rollback", "stage": "train", "step": 4, "to_step": 2})
    table.read({"event": "monitor_lower_lr", "stage": "train", "step": 4, "scale": 0.5})
    assert table.cells()["rollbacks"] == "1"
    assert "last: step 4: learning rate at 0.5 of the configured one" in drawn(table)


def test_a_model_that_no_longer_answers_leaves_the_last_safety_and_says_why(table):
    table.read(MEASURED)
    table.read({**MEASURED, "step": 6, "safety": None, "relative": None, "reason": "only 4 of 10 prompts"})
    assert table.cells()["safety"] == "0.810, 90% of the baseline"
    assert "last: step 6: only 4 of 10 prompts" in drawn(table)


def test_lines_of_another_stage_are_passed_over(table):
    table.read({**STEP, "stage": "align"})
    table.read({"event": "run_started"})
    assert table.cells()["step"] == "-"


def trained(tmp_path, live=True, **terminal):
    """What two steps leave in the terminal."""
    console = Console(file=io.StringIO(), width=80, **terminal)
    context = RunContext(load_config("demo", [f"out={tmp_path}"]), console, live=live)
    callback = MetricsCallback(context, "train")
    with context.live("train"):
        for step in (1, 2):
            state = SimpleNamespace(global_step=step, max_steps=2)
            callback.on_log(None, state, None, logs={"loss": float("nan"), "risk/mean": 0.25})
        context.say("a warning")
    assert (context.folder.path / "metrics.jsonl").read_text().count('"steps": 2') == 2
    context.folder.log({**STEP, "step": 7})  # after the training nobody reads along
    return console.file.getvalue()


def test_in_a_terminal_a_training_is_a_table_and_no_line_a_step(tmp_path):
    shown = trained(tmp_path, force_terminal=True, force_interactive=True)
    assert "2/2" in shown
    assert "step 2/2" not in shown
    assert "a warning" in shown
    assert "7/10" not in shown


def test_the_monitor_may_show_a_progress_bar_while_the_table_is_drawn(tmp_path):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, force_interactive=True)
    context = RunContext(load_config("demo", [f"out={tmp_path}"]), console)
    with context.live("train"), context.progress("answering", 2) as done:
        done(2)
    assert "answering" in console.file.getvalue()


@pytest.mark.parametrize("terminal", [{}, {"live": False, "force_terminal": True, "force_interactive": True}])
def test_without_a_terminal_and_with_no_live_a_step_is_a_line(tmp_path, terminal):
    lines = trained(tmp_path, **terminal).splitlines()
    assert [line.split("  (")[0] for line in lines] == [
        "  step 1/2  loss nan  risk 0.25",
        "  step 2/2  loss nan  risk 0.25",
        "a warning",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (720, "12 min"), (11_100, "3 h 05 min")])
def test_durations_are_read_at_a_glance(table, clock, seconds, text):
    clock.now += seconds
    assert table.cells()["time"] == text
