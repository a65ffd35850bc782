"""Estimates with their intervals as an SVG picture, a row a name and a panel a figure, without a plotting library."""

from collections.abc import Mapping
from html import escape

from ballast.pipeline.evaluation.statistics import Estimate

_NAMES, _PANEL, _GAP, _ROW, _TOP, _BELOW = 170, 230, 30, 26, 70, 34
_COLOURS = ("#be123c", "#d97706", "#1f6feb", "#15803d", "#9333ea")


def intervals_figure(rows: Mapping[str, Mapping[str, Estimate]], title: str, chosen: str | None = None) -> str:
    """An SVG: a dot at each estimate, a line over its interval; nothing where there is no estimate.

    Args:
        rows: by name, its estimates by figure; the figures are those of the first row. A panel runs from 0 to 1, or
            further where an interval does.
        title: above the picture.
        chosen: the row to mark.
    """
    figures = list(next(iter(rows.values())))
    width, height = _NAMES + len(figures) * (_PANEL + _GAP), _TOP + len(rows) * _ROW + _BELOW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{width / 2}" y="24" text-anchor="middle" font-size="15">{escape(title)}</text>',
    ]
    for at, name in enumerate(rows):
        y = _TOP + (at + 0.5) * _ROW
        if name == chosen:
            parts.append(f'<rect x="0" y="{y - _ROW / 2}" width="{width}" height="{_ROW}" fill="#fef3c7"/>')
        parts.append(f'<text x="{_NAMES - 14}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
    for at, figure in enumerate(figures):
        column = [row.get(figure) for row in rows.values()]
        parts += _panel(column, figure, _NAMES + at * (_PANEL + _GAP), _COLOURS[at % len(_COLOURS)])
    return "\n".join([*parts, "</svg>", ""])


def _panel(column: list[Estimate | None], figure: str, left: float, colour: str) -> list[str]:
    ends = [end for e in column if e is not None for end in (e.low, e.high) if end is not None]
    least, most = min([0.0, *ends]), max([1.0, *ends])
    bottom = _TOP + len(column) * _ROW

    def x(value: float) -> float:
        return left + _PANEL * (value - least) / (most - least)

    parts = [
        f'<text x="{left + _PANEL / 2}" y="{_TOP - 14}" text-anchor="middle" fill="{colour}">{escape(figure)}</text>'
    ]
    for tick in (least, (least + most) / 2, most):
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for at, estimate in enumerate(column):
        if estimate is None or estimate.value is None or estimate.low is None or estimate.high is None:
            continue
        y = _TOP + (at + 0.5) * _ROW
        parts.append(
            f'<line x1="{x(estimate.low):.1f}" x2="{x(estimate.high):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{x(estimate.value):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    return parts
