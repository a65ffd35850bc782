"""The tables of a measurement: a row an answer, with its text and what was said of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ballast.pipeline.evaluation.attacks import Asked
from ballast.pipeline.evaluation.judges import Completion, Verdict
from ballast.pipeline.evaluation.task_figures import TaskScores
from ballast.pipeline.table_schemas import ANSWERS, PROBE_ANSWERS, write_table


def write_answers(
    path: Path,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    guard_risk: Sequence[float | None],
    reward: Sequence[float | None],
    task: Mapping[str, TaskScores],
) -> None:
    """Write the answers to a suite; all but `task` has (N,) entries in the same order."""
    rows = [
        {
            **asdict(verdict),
            "prompt": completion.prompt,
            "completion": completion.text,
            "guard_risk": risk,
            "reward": value,
            **{f"reward_{name}": scores.values[row] for name, scores in task.items()},
        }
        for row, (completion, verdict, risk, value) in enumerate(
            zip(completions, verdicts, guard_risk, reward, strict=True)
        )
    ]
    write_table(path, rows, ANSWERS, task)


def write_probe_answers(path: Path, answers: Sequence[Asked], verdicts: Sequence[Verdict]) -> None:
    """Write the (N,) answers to a probe and their verdicts."""
    rows = [
        {**asdict(v), "prompt": a.completion.prompt, "completion": a.completion.text, "written": a.written}
        for a, v in zip(answers, verdicts, strict=True)
    ]
    write_table(path, rows, PROBE_ANSWERS)
