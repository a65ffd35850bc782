"""The columns of the parquet tables that stages write: names, types and meanings, as docs/tables.md shows them.

Types are spelled out: a column that is null in every row would else get a type of its own, and two files of one kind
could not be read as one table.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """One column: its name, its type as Arrow writes it, and what it holds."""

    name: str
    type: str
    meaning: str


ROLLOUTS: tuple[Column, ...] = (
    Column("prompt_id", "string", "id of the prompt in its source"),
    Column("kind", "string", "`harmful`, `scary` or `ordinary`"),
    Column("sample", "int64", "which of the prompt's completions this is, from 0"),
    Column("prompt", "string", "the user's message"),
    Column("completion", "string", "the completion, without special tokens"),
    Column("token_ids", "list<int64>", "its tokens as sampled, the end-of-turn token included"),
    Column("truncated", "bool", "whether it ended at the length limit"),
)

SCORES: tuple[Column, ...] = (
    *ROLLOUTS,
    Column("cuts", "list<int64>", "character offsets into the completion at which the guard judged it; the first is 0"),
    Column("risk", "list<double>", "the guard's risk at each cut, in [0, 1]; null where it could not say"),
    Column("unscored_reason", "string", "why a risk is null; null where none is"),
    Column("lowest_star", "double", "lowest cleaned STAR of the completion, its reward; null where unscored"),
)

VERDICTS: tuple[Column, ...] = (
    Column("prompt_id", "string", "id of the prompt in its source"),
    Column("kind", "string", "`harmful`, `scary` or `ordinary`"),
    Column("sample", "int64", "which of the prompt's answers this is, from 0"),
    Column("truncated", "bool", "whether it ended at the length limit"),
    Column("risk", "double", "the judge's risk of the whole answer, in [0, 1]; null where unscored"),
    Column("unsafe", "bool", "`risk` is at `evaluate.threshold` or above; null where unscored"),
    Column("refused", "bool", "the answer opens with a refusal, by keywords"),
    Column("coherent", "bool", "the answer is readable English"),
    Column("peak_risk", "double", "the judge's highest risk at any cut, where cuts were asked for; else null"),
    Column("reason", "string", "why the judge could not score; null where it could"),
    Column("suite", "string", "the published set, file or hub id that the prompt is from"),
    Column("words", "int64", "length of the answer in words"),
    Column("flaw", "string", "why it is not coherent: `repeated`, `gibberish` or `empty`; null where it is"),
    Column("second_risk", "double", "the second judge's risk; null where there is none, or where unscored"),
    Column("second_unsafe", "bool", "`second_risk` is at the threshold or above; null where that is null"),
    Column(
        "second_reason", "string", "why the second judge could not score; null where it could, or where there is none"
    ),
)

_TEXTS: tuple[Column, ...] = (
    Column("prompt", "string", "the user's message, as the suite has it"),
    Column("completion", "string", "the answer as it was judged"),
)

ANSWERS: tuple[Column, ...] = (
    *VERDICTS,
    *_TEXTS,
    Column("guard_risk", "double", "risk by the guard that rewards, 1 - lowest cleaned STAR; null where unscored"),
    Column("reward", "double", "weighted mean of the reward terms that apply; null where the guard could not score"),
)

PROBE_ANSWERS: tuple[Column, ...] = (
    *VERDICTS,
    *_TEXTS,
    Column("written", "string", "what the model itself wrote of it; `refused` is of this"),
)

TRUTHFULQA: tuple[Column, ...] = (
    Column("question_id", "string", "id of the question in its source"),
    Column("mc1", "bool", "the one right answer is the most probable"),
    Column("mc1_per_token", "bool", "the same by mean log-probability of a token"),
    Column("mc2", "double", "probability of the right answers over that of all, in [0, 1]"),
    Column("mc2_per_token", "double", "the same by mean log-probability of a token"),
)


def schema(columns: Sequence[Column], rewards: Iterable[str] = ()) -> "pa.Schema":
    """The Arrow schema of a table.

    Args:
        columns: its columns.
        rewards: names of task rewards, each of which has a further column `reward_NAME`.
    """
    import pyarrow as pa

    types: dict[str, Any] = {
        "string": pa.string(),
        "int64": pa.int64(),
        "double": pa.float64(),
        "bool": pa.bool_(),
        "list<int64>": pa.list_(pa.int64()),
        "list<double>": pa.list_(pa.float64()),
    }
    further = [(f"reward_{name}", pa.float64()) for name in rewards]
    return pa.schema([*((column.name, types[column.type]) for column in columns), *further])


def write_table(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], rewards: Iterable[str] = ()
) -> None:
    """Write rows as a parquet table.

    Args:
        path: the file.
        rows: one mapping a row; a column that a row lacks is null there.
        columns: the table's columns.
        rewards: as in `schema`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema(columns, rewards)), path)
