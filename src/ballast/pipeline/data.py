"""Prompts and answers from the shipped set, from files and from the hub, in one form."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, cast

from ballast.errors import DataError
from ballast.pipeline.data_columns import ColumnUse, check_columns, take
from ballast.pipeline.data_sources import SHIPPED, Source, parse_source, read_source
from ballast.pipeline.evaluation.named_suites import NamedSuite
from ballast.pipeline.evaluation.suites import KINDS, Kind, Suite, SuitePrompt

if TYPE_CHECKING:
    from ballast.pipeline.config_inputs import DataConfig

Split = Literal["train", "test"]

# Of the draw of test prompts, and not the run's own: see `held_out_suite`.
_TEST_SEED = 0

_SHOWN = 20  # characters of a wrong kind that an error repeats


@dataclass(frozen=True)
class Row:
    """One request, with the answer to imitate where the source has one.

    Attributes:
        source: the file or data set that it is from.
        suite: what figures of that source alone are called.
        columns: further columns that were asked for, for rewards; None where the source has nothing.
    """

    id: str
    prompt: str
    kind: Kind
    category: str | None = None
    response: str | None = None
    source: str = field(default="", compare=False)
    suite: str = field(default="", compare=False)
    columns: dict[str, Any] = field(default_factory=dict, compare=False)


def load_rows(
    sources: Sequence[str], split: Split, config: "DataConfig", answers: bool = False, columns: Sequence[str] = ()
) -> list[Row]:
    """Read sources in order.

    Args:
        sources: `shipped`, `shipped:harmful,scary`, a json, jsonl, csv or parquet file, `owner/name:split` on the
            hub, or a published set by name, from the hub or from such a place: `advbench`, `advbench:rows.csv`.
        split: which half of the shipped rows.
        config: columns, and the kind of rows that do not say theirs.
        answers: whether each row must have an answer.
        columns: further columns to keep.

    Raises:
        DataError: a source that is missing, empty, unreadable or named twice, that lacks a column, or a row
            that is no request of a known kind.
    """
    rows: list[Row] = []
    for source in map(parse_source, sources):
        if source.shipped is not None:
            found = _shipped(source, split, columns)
        elif source.suite is not None:
            found = _published(source, source.suite, answers, columns)
        else:
            found = _table(source, config, answers, columns)
        if not found:
            raise DataError(f"data source '{source.text}' has no rows; give a file with at least one")
        rows += found
    # Answers, verdicts and comparisons refer to a row by its id alone.
    twice = [row_id for row_id, count in Counter(row.id for row in rows).items() if count > 1]
    if twice:
        raise DataError(
            f"row id '{twice[0]}' comes twice from the sources {', '.join(sources)}; name each source once, and give "
            "files of different folders different names"
        )
    return rows


def draw(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """At most `limit` rows, in the proportions of their kinds, drawn by the seed.

    Args:
        rows: what to draw from.
        limit: how many to keep; None, or as many as there are, keeps all of them in order.
        seed: of the draw and of the order.

    Returns:
        The drawn rows in a random order. A kind has its proportional share, rounded by the largest remainder, and at
        least one row where `limit` allows one of each.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    generator = random.Random(seed)
    by_kind = {kind: [row for row in rows if row.kind == kind] for kind in KINDS}
    quota = _quota({kind: len(of_kind) for kind, of_kind in by_kind.items() if of_kind}, limit)
    drawn = [row for kind, count in quota.items() for row in generator.sample(by_kind[kind], count)]
    generator.shuffle(drawn)
    return drawn


def _quota(sizes: dict[Kind, int], limit: int) -> dict[Kind, int]:
    """How many of each kind to keep: `limit` in all, none above its size."""
    exact = {kind: size * limit / sum(sizes.values()) for kind, size in sizes.items()}
    quota = {kind: int(share) for kind, share in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: exact[kind] - quota[kind], reverse=True)
    for kind in by_remainder[: limit - sum(quota.values())]:
        quota[kind] += 1
    # A kind without a row would leave its figures empty: the largest gives it one of its own.
    for kind in [kind for kind, count in quota.items() if count == 0 and limit >= len(sizes)]:
        quota[max(quota, key=quota.__getitem__)] -= 1
        quota[kind] = 1
    return quota


def training_rows(config: "DataConfig", seed: int, columns: Sequence[ColumnUse] = ()) -> list[Row]:
    """The training prompts, none of which is a test prompt.

    Args:
        config: sources and sizes.
        seed: of the draw.
        columns: further columns that the rows must bring.

    Raises:
        DataError: as in `load_rows` and `check_columns`, or a prompt that stands on both sides.
    """
    train = load_rows(config.train, "train", config, columns=[use.name for use in columns])
    check_columns(train, columns)
    test = {normalise(row.prompt) for row in load_rows(config.test, "test", config)}
    shared = [row.id for row in train if normalise(row.prompt) in test]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(train)} training prompts are test prompts too (first: row {shared[0]}), so the measurement "
            "would reward memory; choose other sources for data.train or data.test"
        )
    if config.max_train_per_kind is not None:
        by_kind = ([row for row in train if row.kind == kind] for kind in KINDS)
        train = [row for rows in by_kind for row in draw(rows, config.max_train_per_kind, seed)]
    return draw(train, config.max_train, seed)


def held_out_suite(config: "DataConfig") -> Suite:
    """The held-out prompts as an evaluation suite.

    `data.max_test` draws the same prompts in every run, whatever its seed, so that runs that differ in their
    seed alone are measured on one test set.
    """
    rows = draw(load_rows(config.test, "test", config), config.max_test, _TEST_SEED)
    return Suite("test", tuple(suite_prompt(row) for row in rows))


def suite_prompt(row: Row) -> SuitePrompt:
    """A row as a prompt to measure on."""
    return SuitePrompt(row.id, row.prompt, row.kind, row.category or "", row.suite)


def interleave(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows shuffled by the seed, with each kind spread evenly over the whole.

    A training step sees a few prompts only; were they drawn freely, some steps would hold harmful prompts alone
    and teach to refuse, and the next ones ordinary prompts alone and teach it away.
    """
    order = random.Random(seed)
    placed: list[tuple[float, Row]] = []
    for kind in KINDS:
        of_kind = [row for row in rows if row.kind == kind]
        order.shuffle(of_kind)
        shift = order.random()
        placed += [((i + shift) / len(of_kind), row) for i, row in enumerate(of_kind)]
    return [row for _, row in sorted(placed, key=lambda item: item[0])]


def normalise(prompt: str) -> str:
    """A prompt without case, punctuation and doubled spaces, by which two prompts count as the same."""
    return " ".join("".join(c if c.isalnum() else " " for c in prompt.casefold()).split())


def _shipped(source: Source, split: Split, columns: Sequence[str]) -> list[Row]:
    kinds = source.shipped.split(",") if source.shipped else list(KINDS)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise DataError(
            f"data source '{source.text}': no kind '{unknown[0]}' in the shipped set; it has {', '.join(KINDS)}"
        )
    lines = (resources.files("ballast.data") / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [
        Row(r["id"], r["prompt"], r["kind"], r["category"], r["response"], source.text, SHIPPED, take(r, columns))
        for r in records
        if r["split"] == split and r["kind"] in kinds
    ]


def _published(source: Source, suite: NamedSuite, answers: bool, further: Sequence[str]) -> list[Row]:
    """Rows of a published set, each under its number in the table, so that an id means one prompt whatever is left out."""
    if answers:
        raise DataError(
            f"data source '{source.text}': {suite.name} has requests to measure with and no answers to imitate; take another "
            "source where answers are learnt"
        )
    table = read_source(source)
    column = suite.prompt_column(list(table.column_names), source.text)
    rows = []
    for i, record in enumerate(map(dict, table)):
        kind = suite.kind(record)
        if kind is not None:
            row_id = f"{suite.name}-{i}"
            prompt, kind = _prompt(record, column, row_id, source), _kind(kind, row_id, source, suite.needs)
            category, kept = suite.category(record), take(record, further)
            rows.append(Row(row_id, prompt, kind, category, None, source.text, suite.name, kept))
    return rows


def _table(source: Source, config: "DataConfig", answers: bool, further: Sequence[str]) -> list[Row]:
    table = read_source(source)
    columns = list(table.column_names)
    needed = [("prompt_column", config.prompt_column)] + (
        [("response_column", config.response_column)] if answers else []
    )
    for key, column in needed:
        if column not in columns:
            raise DataError(
                f"data source '{source.text}' has no column '{column}'; it has {', '.join(columns)}: set data.{key} to one of them"
            )
    if config.kind_column not in columns and config.kind is None:
        raise DataError(
            f"data source '{source.text}' has no column '{config.kind_column}' that says which prompts are harmful; set "
            f"data.kind to {', '.join(KINDS)} for all of its rows, or data.kind_column to one of {', '.join(columns)}"
        )
    return [
        _row(f"{source.name}-{i}", dict(record), source, config, answers, further) for i, record in enumerate(table)
    ]


def _row(
    row_id: str, record: dict[str, Any], source: Source, config: "DataConfig", answers: bool, further: Sequence[str]
) -> Row:
    prompt = _prompt(record, config.prompt_column, row_id, source)
    kind = _kind(record.get(config.kind_column, config.kind), row_id, source, (config.kind_column,))
    category, response = record.get("category"), record.get(config.response_column)
    if answers and (not isinstance(response, str) or not response.strip()):
        raise DataError(
            f"data source '{source.text}', row {row_id}: column '{config.response_column}' holds no answer to imitate; remove or mend the row"
        )
    response = response if isinstance(response, str) else None
    category = str(category) if category else None
    return Row(row_id, prompt, kind, category, response, source.text, source.name, take(record, further))


def _prompt(record: dict[str, Any], column: str, row_id: str, source: Source) -> str:
    prompt = record[column]
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    # Named by its type: a list of messages would put their text into the terminal.
    held = "an empty text" if isinstance(prompt, str) else f"a value of type {type(prompt).__name__}"
    raise DataError(
        f"data source '{source.text}', row {row_id}: column '{column}' holds {held}, not a prompt; remove or mend the row"
    )


def _kind(kind: Any, row_id: str, source: Source, columns: Sequence[str]) -> Kind:
    if kind in KINDS:
        return cast("Kind", kind)
    # A column of long texts was named by mistake: its text stays out of the terminal.
    held = repr(kind) if len(str(kind)) <= _SHOWN else f"a value of type {type(kind).__name__}"
    raise DataError(
        f"data source '{source.text}', row {row_id}: kind is {held}, not one of {', '.join(KINDS)}; mend column "
        f"'{columns[0]}'"
    )
