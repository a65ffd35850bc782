"""Summaries as tables: some that fit a terminal of 80 columns, and one in Markdown.

A cell is a value with its interval, `12% [5, 20]` or `0.31 [0.27, 0.36]`. A dash is a figure that does not
exist: an unscored answer is never a 0.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ballast.pipeline.evaluation.cells import DASH, number, percent
from ballast.pipeline.evaluation.further_columns import Columns, Rows, further_columns
from ballast.pipeline.evaluation.metrics import EvaluationSummary

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def _rate(tokens_per_s: float | None) -> str:
    return DASH if tokens_per_s is None else f"{tokens_per_s:,.0f}"


_SAFETY: Columns = {
    "unsafe share\non harmful": lambda s: percent(s.unsafe_share),
    "mean risk,\nby the judge": lambda s: number(s.mean_risk),
    "mean risk,\nby the guard": lambda s: number(s.guard_risk),
    "reward": lambda s: number(s.reward),
}
_QUALITY: Columns = {
    "refused\nharmful": lambda s: percent(s.refusal_harmful),
    "refused\nordinary": lambda s: percent(s.refusal_ordinary),
    "refused\nscary": lambda s: percent(s.refusal_scary),
    "coherent": lambda s: percent(s.coherent_share),
    "written\ntokens/s": lambda s: _rate(s.generation_tokens_per_s),
    "trained\ntokens/s": lambda s: _rate(s.training_tokens_per_s),
}

_BREAK = "\n"  # where a heading may break
_COLUMNS_ABREAST = 3

COLUMNS = ("model", *(heading.replace("\n", " ") for heading in (*_SAFETY, *_QUALITY)))


def render_tables(rows: Rows, width: int) -> "RenderableType":
    """Tables, one above the other, a row a model: safety; refusals, quality and speed; task rewards, and what else was
    measured, where there are any. How the judge agrees with keywords alone is left to the Markdown.

    Args:
        rows: (label, summary) of each model, such as start, after align, after GRPO.
        width: columns of the terminal. Where a row would not fit, intervals stand below their values.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    further = further_columns(rows)
    if not any(summary.second_unsafe_share for _, summary in rows):
        further.pop("Judges", None)
    wide = {"Task rewards": _task_columns(rows), **further}
    titled = [("Safety", _SAFETY), ("Refusals, quality, speed", _QUALITY)]
    titled += [(title, part) for title, columns in wide.items() for part in _abreast(columns)]
    for title, columns in titled:
        table = _table(title, columns, rows, " ")
        parts += [table if _width(table) <= width else _table(title, columns, rows, "\n"), ""]
    if note := unscored_note(rows):
        parts.append(Text(note))
    return Group(*parts)


def markdown_table(rows: Rows) -> str:
    """The summaries as a Markdown table, a row a model, others below it for what else was measured, and the note on unscored
    answers; ends without a line end.
    """
    parts = [_markdown(*table_cells(rows))]
    parts += [f"{title}:\n\n{_markdown(*table)}" for title, table in further_cells(rows).items()]
    if note := unscored_note(rows):
        parts.append(note)
    return "\n\n".join(parts)


def _markdown(headings: list[str], cells: list[list[str]]) -> str:
    rows = [headings, ["---"] + ["---:"] * (len(headings) - 1), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _abreast(columns: Columns) -> list[Columns]:
    """The columns in groups that fit a terminal."""
    named = list(columns.items())
    return [dict(named[i : i + _COLUMNS_ABREAST]) for i in range(0, len(named), _COLUMNS_ABREAST)]


def table_cells(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """The summaries as text: the headings, and a row a model, its label first."""
    tasks = _task_columns(rows)
    columns = (*_SAFETY.values(), *_QUALITY.values(), *tasks.values())
    cells = [[label, *(cell(summary) for cell in columns)] for label, summary in rows]
    return [*COLUMNS, *(f"task: {name}" for name in tasks)], cells


def further_cells(rows: Rows) -> dict[str, tuple[list[str], list[list[str]]]]:
    """By title, what else was measured: as `table_cells`."""
    return {
        title: (
            ["model", *(name.replace(_BREAK, " ") for name in columns)],
            [[label, *(cell(summary) for cell in columns.values())] for label, summary in rows],
        )
        for title, columns in further_columns(rows).items()
    }


def unscored_note(rows: Rows) -> str:
    """How many answers the judge could not score, for the models where it is any; else empty."""
    shares = [f"{label} {s.unscored_share:.1%}" for label, s in rows if s.unscored_share]
    if not shares:
        return ""
    return f"Answers that the judge could not score, which take no part in its figures: {', '.join(shares)}."


def _task_columns(rows: Rows) -> Columns:
    """A column for every task reward that any of the models has."""

    def cell_of(name: str) -> Callable[[EvaluationSummary], str]:
        return lambda summary: number(summary.task.get(name))

    names = dict.fromkeys(name for _, summary in rows for name in summary.task)
    return {name: cell_of(name) for name in names}


def _table(title: str, columns: Columns, rows: Rows, separator: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("model")
    for heading in columns:
        table.add_column(heading, justify="right")
    for label, summary in rows:
        table.add_row(label, *(cell(summary).replace(" ", separator, 1) for cell in columns.values()))
    return table


def _width(table: "Table") -> int:
    from rich.console import Console

    return Console(width=10_000).measure(table).maximum
