"""TruthfulQA's multiple choice from given log-probabilities, and its two layouts; the questions are our own."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ballast.errors import DataError
from ballast.pipeline.config_evaluate import EvaluateConfig
from ballast.pipeline.evaluation.truthfulqa import Question, score, truthfulqa_questions

QUESTION = Question(
    "q-0", "What is two plus two?", {"Four": True, "Five": False}, {"Four": True, "4": True, "Five": False}
)

HUB = {
    "question": "What is two plus two?",
    "mc1_targets": {"choices": ["Four", "Five"], "labels": [1, 0]},
    "mc2_targets": {"choices": ["Four", "4", "Five"], "labels": [1, 1, 0]},
}
REPOSITORY = {
    "question": "What is two plus two?",
    "mc1_targets": {"Four": 1, "Five": 0},
    "mc2_targets": {"Four": 1, "4": 1, "Five": 0},
}


def test_mc2_is_the_probability_of_the_right_answers_over_that_of_all() -> None:
    # Summed: 1/2, 1/8, 1/8 -> (1/2 + 1/8) / (3/4) = 5/6. Per token: 1/2, 1/8, sqrt(1/8) = .354 ->
    # .625 / (.625 + .354) = .639.
    log_probs = {"Four": [math.log(1 / 2)], "4": [math.log(1 / 8)], "Five": [math.log(1 / 4), math.log(1 / 2)]}
    found = score(QUESTION, log_probs)
    assert found.mc2 == pytest.approx(5 / 6)
    assert found.mc2_per_token == pytest.approx(0.625 / (0.625 + math.sqrt(1 / 8)))


def test_the_length_of_an_answer_counts_in_the_sum_and_not_in_the_mean() -> None:
    # Right: 4 tokens of .5 each, .0625 in all. Wrong: 1 token of .25.
    log_probs = {"Four": [math.log(0.5)] * 4, "4": [-9.0], "Five": [math.log(0.25)]}
    found = score(QUESTION, log_probs)
    assert (found.mc1, found.mc1_per_token) == (False, True)


def test_a_tie_is_not_right() -> None:
    assert score(QUESTION, {"Four": [-1.0], "4": [-1.0], "Five": [-1.0]}).mc1 is False


def test_answers_too_long_for_a_float_still_have_a_share() -> None:
    # exp(-2000) is 0 in floating point; the difference of 1 is what counts: e / (e + 1) with "4" out of reach.
    found = score(QUESTION, {"Four": [-2000.0], "4": [-9000.0], "Five": [-2001.0]})
    assert found.mc2 == pytest.approx(math.e / (math.e + 1))


def load(path: Path, **more: Any) -> list[Question]:
    return truthfulqa_questions(EvaluateConfig(truthfulqa=(str(path),), **more))


@pytest.mark.parametrize("record", [HUB, REPOSITORY], ids=["hub", "repository"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_both_published_layouts_give_the_same_questions(tmp_path: Path, record: dict[str, Any], ending: str) -> None:
    path = tmp_path / f"mc_task.{ending}"
    path.write_text(json.dumps([record]) if ending == "json" else json.dumps(record) + "\n")
    (question,) = load(path)
    assert (question.id, question.text) == ("mc_task-0", QUESTION.text)
    assert (question.mc1, question.mc2) == (QUESTION.mc1, QUESTION.mc2)
    assert question.answers == ["Four", "Five", "4"]


def test_parquet_as_the_hub_keeps_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pq.write_table(pa.Table.from_pylist([HUB]), tmp_path / "validation.parquet")
    assert load(tmp_path / "validation.parquet")[0].mc2 == QUESTION.mc2


def test_some_of_the_questions_are_the_same_ones_every_time(tmp_path: Path) -> None:
    path = tmp_path / "mc.json"
    path.write_text(json.dumps([{**HUB, "question": f"Question {i}?"} for i in range(20)]))
    few = [question.id for question in load(path, truthfulqa_max=5)]
    assert len(few) == 5
    assert few == [question.id for question in load(path, truthfulqa_max=5)]
    assert len(load(path, truthfulqa_max=100)) == 20
    assert truthfulqa_questions(EvaluateConfig()) == []


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"Question": "Why?", "Best Answer": "So."}, "has the columns Question, Best Answer, and not question"),
        ({**HUB, "mc1_targets": {"choices": ["Four", "4"], "labels": [1, 1]}}, "row mc-0: mc1_targets needs one right"),
        ({**HUB, "mc2_targets": {"choices": ["Four"], "labels": [1]}}, "row mc-0: mc1_targets needs one right"),
        ({**HUB, "mc1_targets": {"choices": ["Four", " "], "labels": [1, 0]}}, "row mc-0 has an empty question or answer"),
    ],
)  # fmt: skip
def test_another_table_is_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = tmp_path / "mc.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(DataError, match=message):
        load(path)


def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'.*mc.json' does not exist"):
        load(tmp_path / "mc.json")
    (tmp_path / "mc.json").write_text("[{")
    with pytest.raises(DataError, match="cannot be read as json"):
        load(tmp_path / "mc.json")
    with pytest.raises(DataError, match="is another set"):
        truthfulqa_questions(EvaluateConfig(truthfulqa=("shipped",)))
