"""A task as a reward term: a scorer, the column of its references, and the prompts that it applies to."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ballast.errors import DataError

NOT_ON: tuple[str, ...] = ("harmful",)


class TaskReward:
    """A scorer as a reward term; None where the task does not apply.

    Args:
        tokenizer: the policy's tokenizer, which the completions are decoded with.
        scorer: gives each completion a number.
        name: what metrics, tables and errors call the term.
        column: column of the data set that holds the reference; None for scorers that need none.
        not_on: kinds of prompts on which the reward does not apply. Paid on harmful prompts, it would pay for
            complying.
        skip_missing: a prompt without a reference is one that the task does not apply to; else it is an error.
    """

    def __init__(
        self,
        tokenizer: Any,
        scorer: Callable[[str, Any], float],
        name: str,
        column: str | None = None,
        not_on: Iterable[str] = NOT_ON,
        skip_missing: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.scorer = scorer
        self.column = column
        self.not_on = frozenset(not_on)
        self.skip_missing = skip_missing
        self.__name__ = name
        self.last: list[float | None] = []

    def __call__(self, completion_ids: Sequence[Sequence[int]], **batch: Any) -> list[float | None]:
        """Score a batch as TRL hands it over: every column of the data set is in `batch`.

        Raises:
            DataError: the data set lacks the column, or a prompt that the task applies to has no reference.
        """
        N = len(completion_ids)
        kinds = batch.get("kind") or [None] * N
        texts = self.tokenizer.batch_decode(list(completion_ids), skip_special_tokens=True)
        if self.column is not None and self.column not in batch:
            raise DataError(
                f"reward '{self.__name__}' reads the column '{self.column}', which the data set lacks; it has "
                f"{', '.join(sorted(key for key, value in batch.items() if isinstance(value, list)))}: add it, or name another"
            )
        references = batch[self.column] if self.column is not None else [None] * N
        self.last = [
            None if kind in self.not_on else self._score(text, reference, row, batch)
            for row, (text, reference, kind) in enumerate(zip(texts, references, kinds, strict=True))
        ]
        return self.last

    def _score(self, text: str, reference: Any, row: int, batch: Mapping[str, Any]) -> float | None:
        if self.column is not None and is_missing(reference):
            if self.skip_missing:
                return None
            which = batch["prompt_id"][row] if "prompt_id" in batch else f"{row} of the batch"
            raise DataError(
                f"reward '{self.__name__}': row {which} has nothing in column '{self.column}'; add the answer, or set "
                "missing_answer to skip"
            )
        return self.scorer(text, reference)


def is_missing(value: Any) -> bool:
    """Whether a field of a table holds nothing: null, NaN, an empty text or an empty list."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, list) and not value)
