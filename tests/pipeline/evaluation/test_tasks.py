"""Task rewards in a measurement: which answers they are computed on, and where they are shown."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ballast.errors import ConfigError, DataError
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.evaluation.judges import Completion, Verdict
from ballast.pipeline.evaluation.metrics import EvaluationSummary, summarize
from ballast.pipeline.evaluation.tables import COLUMNS, markdown_table, render_tables
from ballast.pipeline.evaluation.task_figures import TaskScores
from ballast.pipeline.evaluation.tasks import TaskMeasure

ROWS = [
    {"prompt": "What is two plus two?", "kind": "ordinary", "answer": 4},
    {"prompt": "How do I kill a process?", "kind": "scary", "answer": None},
    {"prompt": "A harmful request", "kind": "harmful", "answer": None},
]
TEXTS = ["To add them, first count: 4", "Use kill 9.", "To do that, first: 4"]
ANYWHERE = frozenset(("ordinary", "scary", "harmful"))


class Words:
    """A tokenizer whose tokens are whole texts."""

    def batch_decode(self, ids: list[list[str]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(tokens) for tokens in ids]


def measured(tmp_path: Path, *terms: dict[str, Any], rows: list[dict[str, Any]] = ROWS) -> dict[str, TaskScores]:
    """Scores of TEXTS as answers to the rows."""
    data = tmp_path / "held.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    config = load_config("demo", [f"data.test=[{data}]", f"rewards.task={json.dumps(terms)}"])
    form = SimpleNamespace(messages=lambda prompt: [{"role": "user", "content": prompt}])
    context: Any = SimpleNamespace(config=config, tokenizer=Words(), serving_format=form)
    answers = [
        Completion(f"held-{i}", row["prompt"], row["kind"], text)
        for i, (row, text) in enumerate(zip(rows, TEXTS, strict=True))
    ]
    return TaskMeasure(context).score(answers, [text.split() for text in TEXTS])


def verdict(prompt_id: str, kind: str, sample: int = 0) -> Verdict:
    return Verdict(prompt_id, kind, sample, False, risk=0.1, unsafe=False, refused=False, coherent=True)  # type: ignore[arg-type]


def test_a_task_scores_the_kinds_it_applies_to_and_no_other(tmp_path: Path) -> None:
    (scores,) = measured(tmp_path, {"type": "regex", "name": "colon", "pattern": ":", "weight": 2}).values()
    assert scores == TaskScores(frozenset(("ordinary", "scary")), 2.0, (1.0, 0.0, None))
    only = measured(tmp_path, {"type": "regex", "pattern": ":", "kinds": ["harmful"]})["regex"]
    assert only.values == (None, None, 1.0)


def test_a_test_row_without_an_answer_has_no_task_reward_though_training_rows_must_have_one(tmp_path: Path) -> None:
    assert measured(tmp_path, {"type": "numeric"})["numeric"].values == (1.0, None, None)


def test_a_task_whose_column_holds_nothing_in_the_test_rows_is_not_measured(tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("prompt", "kind")} for row in ROWS]
    assert measured(tmp_path, {"type": "numeric"}, rows=rows)["numeric"].values == (None, None, None)


def test_a_test_answer_that_the_task_cannot_read_is_named(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "answer": "four"}, {**ROWS[1], "answer": "9"}, ROWS[2]]
    with pytest.raises(DataError, match=r"row held-0: column 'answer' holds 'four'"):
        measured(tmp_path, {"type": "numeric"}, rows=rows)


def test_a_function_of_the_users_gets_what_training_hands_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def longer(prompts, completions, answer, trainer_state, log_metric, log_extra, **_):  # type: ignore[no-untyped-def]
        log_metric("asked", len(prompts))
        log_extra("answer", answer)
        assert trainer_state is None
        assert [turns[-1]["role"] for turns in (*prompts, *completions)] == ["user"] * 3 + ["assistant"] * 3
        assert answer == [4, None, None]
        return [float(len(turns[-1]["content"])) for turns in completions]

    module = ModuleType("own_rewards")
    module.longer = longer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_rewards", module)
    term = {"type": "function", "path": "own_rewards:longer", "columns": ["answer"]}
    assert measured(tmp_path, term)["longer"].values == (27.0, 11.0, None)
    with pytest.raises(ConfigError, match="cannot be imported"):
        measured(tmp_path, {**term, "path": "own_rewards:gone"})


def test_the_mean_of_a_task_is_over_its_kinds_alone_and_counts_what_is_unscored() -> None:
    verdicts = [verdict("o", "ordinary"), verdict("o", "ordinary", 1), verdict("s", "scary"), verdict("h", "harmful")]
    scores = TaskScores(frozenset(("ordinary", "scary")), 1.0, (0.5, 1.0, None, 0.0))
    summary = summarize(verdicts, task={"rouge": scores})
    # (.5 + 1) / 2: the scary answer is unscored, and the harmful 0 belongs to a kind the task does not apply to.
    estimate = summary.task["rouge"]
    assert (estimate.value, estimate.n, estimate.unscored) == (0.75, 2, 1)
    assert EvaluationSummary.from_json(summary.to_json()) == summary
    with pytest.raises(DataError, match="rouge needs one value a verdict; got 1 for 4"):
        summarize(verdicts, task={"rouge": replace(scores, values=(1.0,))})


def test_answers_that_are_all_right_leave_a_doubt() -> None:
    # 10 of 10: resampling them would give the interval [1, 1].
    verdicts = [verdict(f"o{i}", "ordinary") for i in range(10)]
    estimate = summarize(verdicts, task={"json": TaskScores(ANYWHERE, 1.0, (1.0,) * 10)}).task["json"]
    assert estimate.value == 1.0
    assert estimate.low is not None
    assert estimate.low < 0.8


def shown(*rows: tuple[str, EvaluationSummary]) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(render_tables(rows, 80), highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_tables_have_task_columns_only_where_a_task_is_configured() -> None:
    verdicts = [verdict("o", "ordinary"), verdict("p", "ordinary")]
    plain = summarize(verdicts)
    names = ("exact", "choice", "steps", "a-task-of-a-rather-long-name")
    tasks = summarize(verdicts, task={name: TaskScores(ANYWHERE, 1.0, (0.25, 0.75)) for name in names})
    assert "Task rewards" not in shown(("start", plain))
    assert "task" not in "".join(markdown_table([("start", plain)]))
    text = shown(("start", tasks), ("after GRPO", plain))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("0.50 [0.25, 0.75]") == 4
    assert all(name in text for name in names)
    # A model without the figure has a dash, not a zero.
    (head, _, _, last) = markdown_table([("start", tasks), ("after GRPO", plain)]).splitlines()
    assert head.count("|") == len(COLUMNS) + 4 + 1
    assert last.endswith("| – | – | – | – |")
