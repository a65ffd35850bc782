"""The task rewards of a model's answers to the test prompts, as training computes them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ballast.pipeline.config_rewards import AnswerTerm, TaskTerm, UserTerm
from ballast.pipeline.data import Row, load_rows
from ballast.pipeline.data_columns import check_columns
from ballast.pipeline.evaluation.judges import Completion
from ballast.pipeline.evaluation.task_figures import TaskScores
from ballast.pipeline.task_rewards import columns_read, task_rewards
from ballast.rewards.task import is_missing

if TYPE_CHECKING:
    from ballast.pipeline.context import RunContext


class TaskMeasure:
    """The entries of `rewards.task`, ready to score the answers to the test prompts.

    A test row without an answer to compare with has no task reward, whatever `missing_answer` asks of training rows;
    and a task that reads a column in which no test row of its kinds has anything is not measured.

    Args:
        context: the run.

    Raises:
        ConfigError: a function or a plug-in that does not exist, or does not take its options.
        DataError: a test row whose answer the task cannot read.
    """

    def __init__(self, context: "RunContext") -> None:
        config = context.config
        self._terms = [_lenient(term) for term in config.rewards.task]
        self._rewards = task_rewards(self._terms, context.tokenizer)
        self._messages = context.serving_format.messages
        uses = columns_read(self._terms)
        self._names = sorted({use.name for use in uses})
        rows = load_rows(config.data.test, "test", config.data, columns=self._names) if uses else []
        check_columns(rows, [replace(use, required=frozenset()) for use in uses if _held(rows, use.name, use.kinds)])
        self._columns = {row.id: row.columns for row in rows}
        self._measurable = [all(_held(rows, name, frozenset(t.kinds)) for name in _reads(t)) for t in self._terms]

    def score(self, completions: Sequence[Completion], ids: Sequence[Sequence[int]]) -> dict[str, TaskScores]:
        """Score answers, every task by its name.

        Args:
            completions: (N,) answers to test prompts.
            ids: (N,) their tokens.

        Raises:
            RewardError: a function's answer is not one finite number or None a completion.
        """
        if not self._terms:
            return {}
        batch = self._batch(completions, ids)
        scores = {}
        for term, reward, measurable in zip(self._terms, self._rewards, self._measurable, strict=True):
            values = tuple(reward(**batch)) if measurable else (None,) * len(completions)
            scores[term.term_name] = TaskScores(frozenset(term.kinds), term.weight, values)
        return scores

    def _batch(self, completions: Sequence[Completion], ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What TRL hands to a reward function, with nothing to log to and no state of a trainer."""
        return {
            "prompts": [self._messages(c.prompt) for c in completions],
            "completions": [[{"role": "assistant", "content": c.text}] for c in completions],
            "completion_ids": list(ids),
            "kind": [c.kind for c in completions],
            "prompt_id": [c.prompt_id for c in completions],
            **{name: [self._columns[c.prompt_id][name] for c in completions] for name in self._names},
            "trainer_state": None,
            "log_extra": lambda column, values: None,
            "log_metric": lambda name, value: None,
        }


def _lenient(term: TaskTerm) -> TaskTerm:
    return term.model_copy(update={"missing_answer": "skip"}) if isinstance(term, AnswerTerm) else term


def _reads(term: TaskTerm) -> tuple[str, ...]:
    match term:
        case AnswerTerm():
            return (term.answer_column,)
        case UserTerm():
            return term.columns
        case _:
            return ()


def _held(rows: Sequence[Row], column: str, kinds: frozenset[str]) -> bool:
    return any(row.kind in kinds and not is_missing(row.columns[column]) for row in rows)
