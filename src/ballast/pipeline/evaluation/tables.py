"""Summaries as tables: some that fit a terminal of 80 columns, and one in Markdown.

A cell is a value with its interval, `12% [5, 20]` or `0.31 [0.27, 0.36]`. A dash is a figure that does not
exist: an unscored answer is never a 0.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Rows = Sequence[tuple[str, EvaluationSummary]]

_DASH = "–"


def _percent(estimate: Estimate) -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return _DASH
    return f"{estimate.value:.0%} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _number(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None or estimate.low is None or estimate.high is None:
        return _DASH
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _rate(tokens_per_s: float | None) -> str:
    return _DASH if tokens_per_s is None else f"{tokens_per_s:,.0f}"


# Heading, with a line end where it may break, to the cell.
_Columns = dict[str, Callable[[EvaluationSummary], str]]

_SAFETY: _Columns = {
    "unsafe share\non harmful": lambda s: _percent(s.unsafe_share),
    "mean risk,\nby the judge": lambda s: _number(s.mean_risk),
    "mean risk,\nby the guard": lambda s: _number(s.guard_risk),
    "reward": lambda s: _number(s.reward),
}
_QUALITY: _Columns = {
    "refused\nharmful": lambda s: _percent(s.refusal_harmful),
    "refused\nordinary": lambda s: _percent(s.refusal_ordinary),
    "refused\nscary": lambda s: _percent(s.refusal_scary),
    "coherent": lambda s: _percent(s.coherent_share),
    "written\ntokens/s": lambda s: _rate(s.generation_tokens_per_s),
    "trained\ntokens/s": lambda s: _rate(s.training_tokens_per_s),
}

_TASKS_ABREAST = 3

COLUMNS = ("model", *(heading.replace("\n", " ") for heading in (*_SAFETY, *_QUALITY)))


def render_tables(rows: Rows, width: int) -> "RenderableType":
    """Tables, one above the other, a row a model: safety; refusals, quality and speed; task rewards where there are any.

    Args:
        rows: (label, summary) of each model, such as start, after align, after GRPO.
        width: columns of the terminal. Where a row would not fit, intervals stand below their values.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    tasks = list(_task_columns(rows).items())
    of_tasks = [dict(tasks[i : i + _TASKS_ABREAST]) for i in range(0, len(tasks), _TASKS_ABREAST)]
    titled = [("Safety", _SAFETY), ("Refusals, quality, speed", _QUALITY), *(("Task rewards", t) for t in of_tasks)]
    for title, columns in titled:
        table = _table(title, columns, rows, " ")
        parts += [table if _width(table) <= width else _table(title, columns, rows, "\n"), ""]
    if note := unscored_note(rows):
        parts.append(Text(note))
    return Group(*parts)


def markdown_table(rows: Rows) -> str:
    """The summaries as a Markdown table, a row a model, with the note on unscored answers below; ends without a line end."""
    tasks = _task_columns(rows)
    headings = [*COLUMNS, *(f"task: {name}" for name in tasks)]
    lines = [" | ".join(headings), " | ".join(["---"] + ["---:"] * (len(headings) - 1))]
    for label, summary in rows:
        cells = [cell(summary) for cell in (*_SAFETY.values(), *_QUALITY.values(), *tasks.values())]
        lines.append(" | ".join([label.replace("|", "\\|"), *cells]))
    table = "\n".join(f"| {line} |" for line in lines)
    note = unscored_note(rows)
    return f"{table}\n\n{note}" if note else table


def unscored_note(rows: Rows) -> str:
    """How many answers the judge could not score, for the models where it is any; else empty."""
    shares = [f"{label} {s.unscored_share:.1%}" for label, s in rows if s.unscored_share]
    if not shares:
        return ""
    return f"Answers that the judge could not score, which take no part in its figures: {', '.join(shares)}."


def _task_columns(rows: Rows) -> _Columns:
    """A column for every task reward that any of the models has."""

    def cell_of(name: str) -> Callable[[EvaluationSummary], str]:
        return lambda summary: _number(summary.task.get(name))

    names = dict.fromkeys(name for _, summary in rows for name in summary.task)
    return {name: cell_of(name) for name in names}


def _table(title: str, columns: _Columns, rows: Rows, separator: str) -> "Table":
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
