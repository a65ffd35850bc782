"""The curve of a safety basin as an SVG picture, without a plotting library."""

from collections.abc import Sequence
from html import escape

from ballast.pipeline.restoration.basin import Basin

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 56
_CURVES = (
    ("complied", "#be123c", "no refusal, by keywords"),
    ("unsafe", "#1f6feb", "unsafe, by the judge"),
    ("coherent", "#6b7280", "readable"),
)


def basin_figure(basin: Basin, title: str) -> str:
    """An SVG: each direction thin, their mean thick, over the distance from the model.

    Args:
        basin: the readings; one that could not be told is a gap in its line.
        title: above the picture.
    """
    reach = basin.distances[-1]

    def point(t: float, share: float) -> str:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * (t + reach) / (2 * reach)
        return f"{x:.1f},{_HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * share:.1f}"

    def lines(shares: Sequence[float | None], colour: str, width: float, dashes: str) -> list[str]:
        return [
            f'<polyline points="{" ".join(point(*one) for one in run)}" fill="none" stroke="{colour}" '
            f'stroke-width="{width}"{dashes}/>'
            for run in _runs(basin.distances, shares)
        ]

    middle, bottom = _WIDTH / 2, _HEIGHT - _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{middle}" y="24" text-anchor="middle" font-size="15">{escape(title)}</text>',
        f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{bottom}" y2="{bottom}" stroke="#999"/>',
        f'<line x1="{middle}" x2="{middle}" y1="{_MARGIN}" y2="{bottom}" stroke="#ddd"/>',
    ]
    for at, (figure, colour, label) in enumerate(_CURVES):
        dashes = ' stroke-dasharray="4 3"' if figure == "coherent" else ""
        if len(basin.directions) > 1 and figure != "coherent":
            for direction in basin.directions:
                parts += lines([getattr(reading, figure) for reading in direction], colour, 0.5, "")
        parts += lines(basin.mean(figure), colour, 2, dashes)  # type: ignore[arg-type]
        parts.append(f'<text x="{_MARGIN + 190 * at}" y="44" fill="{colour}">{label}</text>')
    for share in (0.0, 0.5, 1.0):
        y = bottom - (_HEIGHT - 2 * _MARGIN) * share
        parts.append(f'<text x="{_MARGIN - 6}" y="{y + 4}" text-anchor="end">{share:.0%}</text>')
    for t in (-reach, -reach / 2, 0.0, reach / 2, reach):
        x = point(t, 0.0).partition(",")[0]
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{t:g}</text>')
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 14}" text-anchor="middle">distance, in multiples of each matrix\'s norm</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def _runs(distances: Sequence[float], shares: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """Points that could be told, in unbroken runs."""
    runs: list[list[tuple[float, float]]] = [[]]
    for t, share in zip(distances, shares, strict=True):
        if share is None:
            runs.append([])
        else:
            runs[-1].append((t, share))
    return [run for run in runs if run]
