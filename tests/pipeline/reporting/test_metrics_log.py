"""What of metrics.jsonl led to the present model."""

import json

import pytest

from ballast.errors import DataError
from ballast.pipeline.reporting.metrics_log import read_lines, training_of


def started() -> dict:
    return {"event": "stage_started", "stage": "train"}


def step(number: int, **figures: float | None) -> dict:
    return {"event": "step", "stage": "train", "step": number, **figures}


def test_a_training_that_was_begun_anew_leaves_the_former_one_out():
    training = training_of([started(), step(1, loss=9.0), step(2, loss=9.0), started(), step(1, loss=1.0)])
    assert training.points("loss") == ((1, 1.0),)


def test_steps_after_the_checkpoint_count_once_and_as_they_were_made_again():
    resumed = {"event": "training_resumed", "stage": "train", "step": 2}
    late = {"event": "monitor", "stage": "train", "step": 3}
    lines = [started(), step(1, loss=1.0), step(2, loss=2.0), step(3, loss=9.0), late, started(), resumed]
    training = training_of([*lines, step(3, loss=3.0)])
    assert training.points("loss") == ((1, 1.0), (2, 2.0), (3, 3.0))
    assert [event["event"] for event in training.events] == ["training_resumed"]


def test_lines_of_other_stages_take_no_part():
    aligned = {"event": "step", "stage": "align", "step": 50, "loss": 7.0}
    measured = {"event": "measured", "model": "start"}
    assert training_of([aligned, started(), step(1, loss=1.0), measured]).last == 1


def test_a_step_that_could_not_tell_a_figure_is_a_gap_and_not_zero():
    training = training_of([started(), step(1, kl=None), step(2, kl=0.5), step(3)])
    assert training.points("kl") == ((1, None), (2, 0.5))
    assert "kl" in training.figures()
    assert training_of([started(), step(1, kl=None)]).figures() == {"step"}


@pytest.mark.parametrize("bad", ["{half", "[1]"])
def test_a_line_that_cannot_be_read_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(step(1)) + "\n" + bad + "\n")
    with pytest.raises(DataError, match=r"line 2 of .*metrics\.jsonl.* remove that line"):
        read_lines(path)


def test_a_run_without_a_log_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl") == []
