"""Columns of the data that rewards read: from the sources into the training rows, checked before anything runs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ballast.errors import DataError
from ballast.rewards.task import is_missing

if TYPE_CHECKING:
    from ballast.pipeline.data import Row

_SHOWN = 20  # characters of a wrong answer that an error repeats


@dataclass(frozen=True)
class ColumnUse:
    """A column that a reward reads.

    Attributes:
        name: the column.
        by: who reads it, as messages name it.
        key: the configuration's key that names the column.
        kinds: kinds of the rows that it is read from.
        required: kinds of the rows that must hold something in it; where it is empty, one row with something will do.
        problem: why a value cannot be used, or None.
    """

    name: str
    by: str
    key: str
    kinds: frozenset[str]
    required: frozenset[str]
    problem: Callable[[Any], str | None] | None = None


def take(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The columns of one record; None where it has none or holds nothing."""
    return {name: None if _is_nan(record.get(name)) else record.get(name) for name in names}


def check_columns(rows: Sequence["Row"], uses: Sequence[ColumnUse]) -> None:
    """Every row that a reward applies to has what the reward reads, and it can be read.

    Args:
        rows: training rows that bring the columns.
        uses: the columns.

    Raises:
        DataError: names the row, its file, the column and who reads it.
    """
    for use in uses:
        of_kind = [row for row in rows if row.kind in use.kinds]
        held = [row for row in of_kind if not is_missing(row.columns[use.name])]
        if of_kind and not held:
            first = of_kind[0]
            raise DataError(
                f"{use.by} reads column '{use.name}', and no training row of kind {' or '.join(sorted(use.kinds))} has anything in it (first: "
                f"row {first.id} of '{first.source}'); set {use.key} to a column of the data"
            )
        missing = [row for row in of_kind if row.kind in use.required and is_missing(row.columns[use.name])]
        if missing:
            raise DataError(
                f"data source '{missing[0].source}', row {missing[0].id}: nothing in column '{use.name}', which {use.by} reads "
                f"({len(missing)} of {len(of_kind)} rows are so); add the answers, set missing_answer to skip for rows that "
                "have none, or take their kind out of the term's kinds"
            )
        for row in held:
            if use.problem is not None and (why := use.problem(row.columns[use.name])):
                raise DataError(
                    f"data source '{row.source}', row {row.id}: column '{use.name}' holds {_shown(row.columns[use.name])}, which {why}, "
                    f"as {use.by} needs it; mend the row"
                )
        _check_one_type([row for row in rows if not is_missing(row.columns[use.name])], use)


def _check_one_type(rows: Sequence["Row"], use: ColumnUse) -> None:
    """A data set has one type a column."""
    first: tuple[str, Row] | None = None
    for row in rows:
        kind = _type(row.columns[use.name])
        if first is None:
            first = kind, row
        elif kind != first[0]:
            raise DataError(
                f"column '{use.name}', which {use.by} reads, holds {first[0]} in row {first[1].id} of '{first[1].source}' and {kind} in row "
                f"{row.id} of '{row.source}'; write all of them alike"
            )


def _type(value: Any) -> str:
    match value:
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return f"a list of {', '.join(sorted({_type(item) for item in value}))}"
        case _:
            return f"a {type(value).__name__}"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"a value of type {type(value).__name__}"
