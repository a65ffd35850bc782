"""The parquet tables of the stages: what the docs say is in them is in them, and `datasets` reads them as one table."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from ballast.pipeline.evaluation.answer_table import write_answers, write_probe_answers
from ballast.pipeline.evaluation.attacks import Asked
from ballast.pipeline.evaluation.judges import Completion, Verdict
from ballast.pipeline.evaluation.measure import read_verdicts
from ballast.pipeline.evaluation.task_figures import TaskScores
from ballast.pipeline.table_schemas import (
    ANSWERS,
    PROBE_ANSWERS,
    ROLLOUTS,
    SCORES,
    TRUTHFULQA,
    VERDICTS,
    Column,
    schema,
    write_table,
)

DOCS = Path(__file__).parents[2] / "docs" / "tables.md"
TABLES = {
    "rollouts.parquet": ROLLOUTS,
    "scores.parquet": SCORES[len(ROLLOUTS) :],
    "LABEL.parquet": ANSWERS,
    "LABEL-prefill.parquet": PROBE_ANSWERS[len(VERDICTS) :],
    "LABEL-truthfulqa.parquet": TRUTHFULQA,
}
VERDICT = Verdict("a", "harmful", 0, False, None, None, False, True, reason="too long", suite="own", words=2)
COMPLETION = Completion("a", "A request", "harmful", "An answer", suite="own")


@pytest.mark.parametrize("name", TABLES)
def test_every_column_is_documented_and_no_other(name: str) -> None:
    section = DOCS.read_text(encoding="utf-8").split(f"`{name}`", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| ([\w<>]+) \| (.+) \|$", section, flags=re.MULTILINE)
    assert [Column(*row) for row in rows] == list(TABLES[name])


def test_the_columns_of_a_verdict_are_its_fields() -> None:
    assert [column.name for column in VERDICTS] == list(asdict(VERDICT))


def test_datasets_reads_tables_of_two_models_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # In one table nothing is scored, in the other all is: without a schema, `risk` would be of two types.
    scored = Verdict("a", "harmful", 0, False, 0.5, True, False, True, second_risk=0.1, second_unsafe=False)
    task = {"exact": TaskScores(frozenset(("ordinary",)), 1.0, (None,))}
    for name, verdict, risk in (("start", VERDICT, None), ("final", scored, 0.25)):
        write_answers(tmp_path / f"{name}.parquet", [COMPLETION], [verdict], [risk], [risk], task)
    read = datasets.load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train")
    assert read.column_names == [*(column.name for column in ANSWERS), "reward_exact"]
    assert sorted(read["guard_risk"], key=str) == [0.25, None]
    assert read_verdicts(tmp_path / "start.parquet") == [VERDICT]
    assert read_verdicts(tmp_path / "final.parquet") == [scored]


def test_datasets_reads_every_other_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rollout = {"prompt_id": "a", "kind": "harmful", "sample": 0, "prompt": "A request", "completion": "An answer"}
    rollout |= {"token_ids": [1, 2], "truncated": False}
    unscored = {"cuts": [0, 9], "risk": [None, None], "unscored_reason": "too long", "lowest_star": None}
    write_table(tmp_path / "rollouts.parquet", [rollout], ROLLOUTS)
    write_table(tmp_path / "scores.parquet", [{**rollout, **unscored}], SCORES)
    write_probe_answers(tmp_path / "probe.parquet", [Asked(COMPLETION, "An answer")], [VERDICT])
    for name, columns in (("rollouts", ROLLOUTS), ("scores", SCORES), ("probe", PROBE_ANSWERS)):
        read = datasets.load_dataset("parquet", data_files=str(tmp_path / f"{name}.parquet"), split="train")
        assert read.column_names == [column.name for column in columns]
        assert len(read) == 1


def test_a_table_without_rows_keeps_its_columns(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_table(tmp_path / "empty.parquet", [], ROLLOUTS)
    assert pq.read_schema(tmp_path / "empty.parquet").equals(schema(ROLLOUTS))
