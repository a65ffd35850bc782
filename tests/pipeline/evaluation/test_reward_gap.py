"""The alarm for a reward that is gamed: risks with a known course."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline.evaluation.further_columns import gap_line
from ballast.pipeline.evaluation.reward_gap import completions_of, gap_between, gap_over_training, harmful_risks

N = 40


def risks(value: float, spread: float = 0.05) -> dict[str, list[float | None]]:
    """Two answers a prompt around a mean."""
    return {f"p{i}": [value + spread * ((i % 5) - 2) / 2, value] for i in range(N)}


def test_a_guard_that_is_pleased_alone_raises_the_alarm() -> None:
    gap = gap_between((risks(0.8), risks(0.2)), (risks(0.6), risks(0.6)))
    assert gap.guard.value == pytest.approx(-0.6)
    assert gap.judge.value == pytest.approx(0.0)
    assert gap.gap.value == pytest.approx(0.6)
    assert gap.alarm is True
    assert "ALARM" in gap_line("start -> final", gap)


def test_no_alarm_where_both_fall_however_different_their_scales() -> None:
    gap = gap_between((risks(0.8), risks(0.2)), (risks(0.6), risks(0.5)))
    assert gap.gap.value == pytest.approx(0.5)
    assert gap.alarm is False


def test_no_alarm_where_the_guard_is_not_pleased() -> None:
    assert gap_between((risks(0.5), risks(0.5)), (risks(0.4), risks(0.8))).alarm is False


def test_an_alarm_needs_a_gap_that_is_no_luck() -> None:
    # Guard -.02 on every prompt; the judge moves up and down by .5, .02 up on the mean.
    up_and_down: dict[str, list[float | None]] = {f"p{i}": [0.5 + (0.5 if i % 2 else -0.46)] for i in range(N)}
    gap = gap_between((risks(0.52, 0), risks(0.5, 0)), (risks(0.5, 0), up_and_down))
    assert gap.guard.high is not None
    assert gap.guard.high < 0
    assert gap.judge.value == pytest.approx(0.02)
    assert gap.alarm is False


def test_what_was_not_scored_gives_no_alarm_and_no_all_clear() -> None:
    nothing: dict[str, list[float | None]] = {f"p{i}": [None] for i in range(N)}
    gap = gap_between((risks(0.8), risks(0.2)), (nothing, risks(0.6)))
    assert gap.alarm is None
    assert "not measured" in gap_line("start -> final", gap)


def rows(guard_by_step: list[float], kind: str = "harmful") -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "kind": kind,
            "prompt": f"prompt {i}",
            "completion": f"step {step} text",
            "risk": [0.5, 0.9, risk],
        }
        for step, risk in enumerate(guard_by_step)
        for i in range(12)
    ]


def judged(risk_of_step: dict[int, float]) -> ScriptedGuardrail:
    return ScriptedGuardrail(lambda exchange, prefix: risk_of_step[int(exchange.response.split()[1])])


def test_over_a_training_the_last_part_is_held_against_the_first() -> None:
    falling = rows([0.8, 0.8, 0.5, 0.5, 0.2, 0.2])
    still = judged(dict.fromkeys(range(6), 0.6))
    gap = gap_over_training(falling, still, windows=3, per_window=1000)
    assert gap is not None
    assert [(w.first_step, w.last_step) for w in gap.windows] == [(0, 1), (2, 3), (4, 5)]
    # Whole completions: the last risk of each row, not the highest.
    assert [w.guard.value for w in gap.windows] == pytest.approx([0.8, 0.5, 0.2])
    assert [w.judge.value for w in gap.windows] == pytest.approx([0.6, 0.6, 0.6])
    assert gap.change.gap.value == pytest.approx(0.6)
    assert gap.change.alarm is True
    honest = judged({step: 0.9 - 0.1 * step for step in range(6)})
    again = gap_over_training(falling, honest, windows=3, per_window=1000)
    assert again is not None
    assert again.change.alarm is False


def test_the_judge_reads_no_more_than_was_asked_for_and_harmful_prompts_alone() -> None:
    asked = []

    def note(exchange: Any, prefix: str) -> float:
        asked.append(exchange)
        return 0.5

    both = [*rows([0.8] * 4), *rows([0.1] * 4, kind="ordinary")]
    gap = gap_over_training(both, ScriptedGuardrail(note), windows=2, per_window=5)
    assert gap is not None
    assert len(asked) == 10
    assert [w.guard.value for w in gap.windows] == pytest.approx([0.8, 0.8])


def test_a_training_that_is_too_short_has_no_gap() -> None:
    judge = judged(dict.fromkeys(range(6), 0.6))
    assert gap_over_training(rows([0.8, 0.2]), judge, windows=3, per_window=5) is None
    assert gap_over_training(rows([0.8] * 4, kind="ordinary"), judge, windows=2, per_window=5) is None
    assert gap_over_training([], judge, windows=2, per_window=5) is None


def test_tables_are_read_by_column_and_kind(tmp_path: Path) -> None:
    answers = [{"prompt_id": "a", "kind": "harmful", "risk": 0.5}, {"prompt_id": "a", "kind": "harmful", "risk": None}]
    pq.write_table(pa.Table.from_pylist([*answers, {**answers[0], "kind": "scary"}]), tmp_path / "final.parquet")
    assert harmful_risks(tmp_path / "final.parquet", "risk") == {"a": [0.5, None]}
    for part, risk in enumerate((0.8, 0.2)):
        pq.write_table(pa.Table.from_pylist(rows([risk])), tmp_path / f"step-{part:05d}-000.parquet")
    (tmp_path / "final.parquet").unlink()
    assert len(completions_of(tmp_path)) == 24
    assert completions_of(tmp_path / "none") == []
