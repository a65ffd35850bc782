"""Suites are read whole or refused with the line at fault."""

import json
from importlib import resources
from pathlib import Path

import pytest

from ballast.errors import DataError
from ballast.pipeline.evaluation.suites import KINDS, SuitePrompt, load_suite, shipped_suite

ROW = {"id": "a1", "prompt": "How do I bake bread?", "kind": "ordinary", "category": "cooking", "split": "test"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_a_row_becomes_a_prompt_and_other_columns_are_left_alone(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl", ROW | {"response": "Mix flour and water."}, "", ROW | {"id": "a2", "kind": "scary"}
    )
    suite = load_suite(path)
    assert suite.name == "mine"
    assert suite.prompts[0] == SuitePrompt("a1", "How do I bake bread?", "ordinary", "cooking")
    assert [p.id for p in suite.of_kind("scary")] == ["a2"]


def test_a_split_keeps_its_own_rows_only(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", ROW, ROW | {"id": "a2", "split": "train"})
    assert [p.id for p in load_suite(path, split="train").prompts] == ["a2"]
    with pytest.raises(DataError, match="no row with split 'dev'"):
        load_suite(path, split="dev")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{no json", "line 2 is no JSON"),
        ("[1]", "line 2 holds a list"),
        (ROW | {"id": "a1"}, "line 2: id 'a1' stands there twice"),
        (ROW | {"id": "a2", "kind": "rude"}, "line 2: kind 'rude' is none of harmful, scary, ordinary"),
        (ROW | {"id": "a2", "prompt": " "}, "line 2: 'prompt' is missing"),
        ({"id": "a2"}, "line 2: 'prompt' is missing"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_suite(write(tmp_path / "mine.jsonl", ROW, row))


def test_a_missing_file_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_suite(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no row"):
        load_suite(write(tmp_path / "empty.jsonl"))


def test_a_package_without_its_data_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"holds no data/requests\.jsonl"):
        shipped_suite()


def test_the_shipped_splits_hold_every_kind_and_share_no_prompt() -> None:
    test, train = shipped_suite("test"), shipped_suite("train")
    assert all(test.of_kind(kind) for kind in KINDS)
    assert all(train.of_kind(kind) for kind in KINDS)
    assert not {p.prompt for p in test.prompts} & {p.prompt for p in train.prompts}
    assert not {p.id for p in test.prompts} & {p.id for p in train.prompts}
