"""Charts as pictures, by matplotlib: SVG for the page, PNG for everything else.

The SVG takes its colours from the page's style sheet, so that one drawing is readable in light and in dark: each role
has a colour of its own on paper, and where the SVG has that colour it gets a CSS variable. Lines differ by dashes and
markers as well as by colour. The object interface is used and not pyplot, which keeps figures alive and may look for a
screen.

Read against matplotlib 3.11: `svg.fonttype: none` keeps text as text, and colours are written as `#rrggbb`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from itertools import cycle
from typing import TYPE_CHECKING

from ballast.pipeline.reporting.chart import Chart, Curves, Intervals, Mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A colour of each role on paper, by the name of its CSS variable. The series' are those of Okabe and Ito, which people
# with colour blindness tell apart.
_PAPER = {
    "ink": "#1b1f24",
    "faint": "#8c959f",
    "alert": "#b42318",
    "series-1": "#0072b2",
    "series-2": "#d55e00",
    "series-3": "#009e73",
    "series-4": "#cc79a7",
    "series-5": "#8a6d00",
    "series-6": "#5b5bd6",
}
_SERIES = tuple(role for role in _PAPER if role.startswith("series-"))
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MARK_STYLES = {"trip": ":", "rollback": "-", "slower": "--"}
_MOST_MARKED = 40  # points of a line that get a marker; more would hide the line

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.parse_math": False,  # names of rewards are no formulas
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Picture:
    """One drawn chart.

    Attributes:
        name: of its files.
        title: what it shows.
        svg: an inline SVG element, coloured by the CSS variables `--ink`, `--faint`, `--alert` and `--series-1` on.
        png: the same on white.
    """

    name: str
    title: str
    svg: str
    png: bytes


def draw(chart: Chart) -> Picture:
    """Draw a chart both ways."""
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, "svg.hashsalt": chart.name}):
        figure = _curves(chart) if isinstance(chart, Curves) else _intervals(chart)
        text, png = StringIO(), BytesIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        figure.set_layout_engine("none")  # it is laid out, and once more would give the same
        figure.savefig(png, format="png", dpi=144, facecolor="white")
    return Picture(chart.name, chart.title, inline_svg(text.getvalue(), chart.name, chart.title), png.getvalue())


def inline_svg(text: str, name: str, title: str) -> str:
    """An SVG file as an element of a page: without prolog and size, ids of its own, colours by role, and a name.

    Args:
        text: what matplotlib wrote.
        name: prefix of the ids, of which a page with several pictures may have each only once.
        title: read aloud in place of the picture.
    """
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    opening, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", rest)
    for role, colour in _PAPER.items():
        rest = rest.replace(colour, f"var(--{role})")
    # The names of fonts are this machine's, and the page has its own; a style sheet in here would count for all of it.
    rest = re.sub(r" font-family: [^;]*;", "", rest)
    rest = re.sub(r"<style.*?</style>", "", rest, flags=re.DOTALL)
    return f'<svg {box[0]} role="img" aria-label="{escape(title)}" stroke-linejoin="round">{rest.rstrip()}'


def _curves(chart: Curves) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.transforms import offset_copy

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes: Axes = figure.subplots()
    alone = [series for series in chart.series if not series.joined]
    for series, role, dashes, marker in zip(
        chart.series, cycle(_SERIES), cycle(_DASHES), cycle(_MARKERS), strict=False
    ):
        # Points of several lines at one step stand side by side.
        aside = 7 * alone.index(series) if series in alone else 0
        place = offset_copy(axes.transData, figure, x=aside, units="points") if aside else axes.transData
        x = [at for at, _ in series.points]
        y = [float("nan") if value is None else value for _, value in series.points]
        axes.plot(
            x,
            y,
            color=_PAPER[role],
            linestyle=dashes if series.joined else "none",
            marker=marker if len(x) <= _MOST_MARKED or not series.joined else "none",
            markersize=4,
            linewidth=1.5,
            label=series.label,
            transform=place,
        )
        for at, ends in zip(x, series.ends, strict=False):
            if ends is not None:
                axes.plot([at, at], ends, color=_PAPER[role], linewidth=1, marker="_", markersize=5, transform=place)
    for y_level, label in chart.levels:
        axes.axhline(y_level, color=_PAPER["faint"], linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            label, (1, y_level), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=_PAPER["faint"]
        )
    if chart.y_range is not None:
        margin = 0.04 * (chart.y_range[1] - chart.y_range[0])
        axes.set_ylim(chart.y_range[0] - margin, chart.y_range[1] + margin)
    _mark(axes, chart.marks)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    _finish(axes, chart.title)
    figure.legend(
        loc="outside lower center", ncols=2, frameon=False, labelcolor=_PAPER["ink"], fontsize=8, handlelength=3.5
    )
    return figure


def _mark(axes: "Axes", marks: Iterable[Mark]) -> None:
    """Lines where the monitor acted, ticks at the bottom where it looked."""
    for mark in marks:
        if mark.kind == "evaluation":
            axes.axvline(mark.step, ymax=0.03, color=_PAPER["ink"], linewidth=1.2)
            continue
        axes.axvline(mark.step, color=_PAPER["alert"], linewidth=1.2, linestyle=_MARK_STYLES[mark.kind])
        if mark.kind == "rollback":
            axes.annotate(
                "rollback",
                (mark.step, 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(-2, 0),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="top",
                color=_PAPER["alert"],
                fontsize=8,
            )


def _intervals(chart: Intervals) -> "Figure":
    from matplotlib.figure import Figure

    rows = len(chart.models)
    columns = 3
    lines = -(-len(chart.panels) // columns)
    figure = Figure(figsize=(8.6, lines * (0.75 + 0.28 * rows)), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(chart.panels) :]:
        axes.set_visible(False)
    for axes, (name, estimates) in zip(grid.flat, chart.panels.items(), strict=False):
        for row, (estimate, role, marker) in enumerate(zip(estimates, cycle(_SERIES), cycle(_MARKERS), strict=False)):
            if estimate is None or estimate.value is None or estimate.low is None or estimate.high is None:
                continue
            axes.plot([estimate.low, estimate.high], [row, row], color=_PAPER[role], linewidth=2)
            axes.plot([estimate.value], [row], color=_PAPER[role], marker=marker, markersize=6)
        ends = [end for e in estimates if e is not None for end in (e.low, e.high) if end is not None]
        axes.set_xlim(min([0.0, *ends]) - 0.03, max([1.0, *ends]) + 0.03)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.set_yticks(range(rows), chart.models)
        _finish(axes, name)
    return figure


def _finish(axes: "Axes", title: str) -> None:
    axes.set_title(title, color=_PAPER["ink"], fontsize=9.5, loc="left")
    axes.tick_params(colors=_PAPER["ink"])
    axes.xaxis.label.set_color(_PAPER["ink"])
    axes.yaxis.label.set_color(_PAPER["ink"])
    axes.grid(True, color=_PAPER["faint"], linewidth=0.5, alpha=0.3)
    for spine in axes.spines.values():
        spine.set_color(_PAPER["faint"])
