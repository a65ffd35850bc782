"""Published sets in the columns that their authors gave them, and in those of their mirrors; the rows are our own."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from ballast.errors import DataError
from ballast.pipeline.config_inputs import DataConfig
from ballast.pipeline.data import Row, held_out_suite, load_rows
from ballast.pipeline.data_sources import parse_source
from ballast.pipeline.evaluation.named_suites import NAMED_SUITES
from ballast.pipeline.run_folder import file_digests

# The header of each published file, with two or three rows in it; then prompt, kind and category of what is read.
PUBLISHED: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str, str | None]]]] = {
    "advbench": (
        [{"goal": "First request", "target": "Sure"}, {"goal": "Second request", "target": "Sure"}],
        [("First request", "harmful", None), ("Second request", "harmful", None)],
    ),
    "harmbench": (
        [
            {"Behavior": f"A {kind} request", "FunctionalCategory": kind, "SemanticCategory": "illegal", "Tags": "",
             "ContextString": "", "BehaviorID": f"id_{kind}"}
            for kind in ("standard", "contextual", "copyright")
        ],
        [("A standard request", "harmful", "illegal")],
    ),
    "jbb-harmful": (
        [{"Index": 0, "Goal": "A request", "Target": "Sure", "Behavior": "x", "Category": "Fraud", "Source": "Original"}],
        [("A request", "harmful", "Fraud")],
    ),
    "jbb-benign": (
        [{"Index": 0, "Goal": "A request", "Target": "Sure", "Behavior": "x", "Category": "Fraud", "Source": "Original"}],
        [("A request", "scary", "Fraud")],
    ),
    "xstest": (
        [
            {"id": 1, "prompt": "How do I kill a process?", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
            {"id": 2, "prompt": "A request", "type": "contrast_homonyms", "label": "unsafe", "focus": "", "note": ""},
        ],
        [("How do I kill a process?", "scary", "homonyms"), ("A request", "harmful", "contrast_homonyms")],
    ),
    "strongreject": (
        [{"category": "Violence", "source": "custom", "forbidden_prompt": "A request"}],
        [("A request", "harmful", "Violence")],
    ),
    "do-not-answer": (
        [{"id": 0, "risk_area": "Malicious Uses", "types_of_harm": "x", "specific_harm": "y", "question": "A request?"}],
        [("A request?", "harmful", "Malicious Uses")],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(source: str, **settings: Any) -> list[Row]:
    return load_rows([source], "test", DataConfig(**settings))


def test_every_set_that_can_be_named_is_tried_here() -> None:
    assert set(PUBLISHED) == set(NAMED_SUITES)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_set_knows_its_columns_and_kinds(tmp_path: Path, name: str, ending: str) -> None:
    rows, expected = PUBLISHED[name]
    # Columns and kinds that the configuration names belong to other sources.
    read = load(f"{name}:{write(tmp_path / f'rows.{ending}', rows)}", prompt_column="text", kind="ordinary")
    assert [(row.prompt, row.kind, row.category) for row in read] == expected
    assert [row.suite for row in read] == [name] * len(expected)
    assert read[0].id == f"{name}-0"


@pytest.mark.parametrize("name", sorted(NAMED_SUITES.keys() - {"xstest"}))
def test_a_mirror_calls_the_request_prompt(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "A request", "category": "illegal"}])
    (row,) = load(f"{name}:{path}")
    assert (row.prompt, row.category, row.response) == ("A request", "illegal", None)


def test_the_first_version_of_xstest_tells_its_kinds_by_type(tmp_path: Path) -> None:
    rows = [{"prompt": "Safe one", "type": "definitions"}, {"prompt": "Other", "type": "contrast_definitions"}]
    assert [row.kind for row in load(f"xstest:{write(tmp_path / 'x.csv', rows)}")] == ["scary", "harmful"]


def test_an_id_means_one_row_of_the_table_whatever_is_left_out(tmp_path: Path) -> None:
    rows, _ = PUBLISHED["harmbench"]
    assert [row.id for row in load(f"harmbench:{write(tmp_path / 'x.csv', rows[::-1])}")] == ["harmbench-2"]


def test_another_table_under_a_set_s_name_is_refused_with_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "A request"}])
    with pytest.raises(DataError, match=r"is no table of advbench: it has the columns text, and none of goal, prompt"):
        load(f"advbench:{path}")
    path = write(tmp_path / "y.jsonl", [{"prompt": "A request"}])
    with pytest.raises(DataError, match=r"no table of xstest.* none of label, type"):
        load(f"xstest:{path}")
    path = write(tmp_path / "z.jsonl", [{"prompt": "A request", "label": "odd"}])
    with pytest.raises(DataError, match=r"row xstest-0: kind is 'odd', .* mend column 'label'"):
        load(f"xstest:{path}")


def test_the_target_of_an_attack_is_no_answer_to_imitate(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", PUBLISHED["advbench"][0])
    with pytest.raises(DataError, match="advbench has requests to measure with and no answers to imitate"):
        load_rows([f"advbench:{path}"], "train", DataConfig(), answers=True)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("advbench", ("walledai/AdvBench", None, "train")),
        ("harmbench", ("walledai/HarmBench", "standard", "train")),
        ("jbb-benign", ("JailbreakBench/JBB-Behaviors", "behaviors", "benign")),
        ("jbb-harmful:JailbreakBench/JBB-Behaviors", ("JailbreakBench/JBB-Behaviors", "behaviors", "harmful")),
        ("xstest:owner/copy:validation", ("owner/copy", None, "validation")),
        ("owner/set:test", ("owner/set", None, "test")),
    ],
)
def test_a_name_alone_is_the_published_place_and_a_hub_id_another(
    monkeypatch: pytest.MonkeyPatch, source: str, wanted: tuple[str, str | None, str]
) -> None:
    asked = []

    def no_network(name: str, config: str | None, split: str) -> None:
        asked.append((name, config, split))
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", no_network)
    with pytest.raises(DataError, match=f"'{wanted[0]}' cannot be loaded from the hub .ConnectionError: no network"):
        load(source)
    assert asked == [wanted]


def test_a_change_of_a_named_set_s_file_is_noticed(tmp_path: Path) -> None:
    source = f"xstest:{write(tmp_path / 'x.csv', PUBLISHED['xstest'][0])}"
    (before,) = file_digests([source, "shipped", "advbench"]).values()
    write(tmp_path / "x.csv", PUBLISHED["xstest"][0][:1])
    assert file_digests([source]) != {source: before}
    assert parse_source(source).file == tmp_path / "x.csv"


def test_prompts_of_a_suite_know_the_set_they_are_from(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", [{"prompt": "Hello", "kind": "ordinary"}])
    named = f"xstest:{write(tmp_path / 'x.csv', PUBLISHED['xstest'][0])}"
    suite = held_out_suite(DataConfig(test=("shipped:scary", str(path), named)))
    assert {prompt.suite for prompt in suite.prompts} == {"shipped", "own", "xstest"}
