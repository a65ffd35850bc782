"""Summaries as tables: two that fit a terminal of 80 columns, and one in Markdown.

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

COLUMNS = ("model", *(heading.replace("\n", " ") for heading in (*_SAFETY, *_QUALITY)))


def render_tables(rows: Rows, width: int) -> "RenderableType":
    """Two tables, one above the other, a row a model: safety; refusals, quality and speed.

    Args:
        rows: (label, summary) of each model, such as start, after align, after GRPO.
        width: columns of the terminal. Where a row would not fit, intervals stand below their values.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for title, columns in (("Safety", _SAFETY), ("Refusals, quality, speed", _QUALITY)):
        table = _table(title, columns, rows, " ")
        parts += [table if _width(table) <= width else _table(title, columns, rows, "\n"), ""]
    if note := unscored_note(rows):
        parts.append(Text(note))
    return Group(*parts)


def markdown_table(rows: Rows) -> str:
    """The summaries as a Markdown table, a row a model, with the note on unscored answers below; ends without a line end."""
    lines = [" | ".join(COLUMNS), " | ".join(["---"] + ["---:"] * (len(COLUMNS) - 1))]
    for label, summary in rows:
        cells = [cell(summary) for cell in (*_SAFETY.values(), *_QUALITY.values())]
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
