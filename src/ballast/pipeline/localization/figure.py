"""The curve of a localisation as an SVG picture, without a plotting library."""

from collections.abc import Sequence

from ballast.pipeline.localization.bands import Band, Curve

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 56
_COLOURS = ("#1f6feb", "#d97706", "#15803d", "#9333ea", "#be123c")


def figure(curves: Sequence[Curve], band: Band | None, title: str, label: str) -> str:
    """An SVG: one line a seed with its 95% band, the chosen layers shaded.

    Args:
        curves: one a seed; a layer without a score is a gap in the line.
        band: the chosen layers, or None.
        title: above the picture.
        label: of the vertical axis.
    """
    layers = len(curves[0].value)
    ends = [v for c in curves for column in (c.value, c.low, c.high) for v in column if v is not None] or [0.0]
    bottom, top = min(0.0, *ends), max(*ends, 1e-9)

    def x(layer: float) -> float:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * (layer + 0.5) / layers

    def y(value: float) -> float:
        return _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (value - bottom) / (top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_WIDTH / 2}" y="24" text-anchor="middle" font-size="15">{title}</text>',
    ]
    if band is not None:
        left, right = x(band[0] - 0.5), x(band[1] + 0.5)
        parts.append(
            f'<rect x="{left:.1f}" y="{_MARGIN}" width="{right - left:.1f}" height="{_HEIGHT - 2 * _MARGIN}" fill="#fde68a"/>'
        )
    parts.append(f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{y(0):.1f}" y2="{y(0):.1f}" stroke="#999"/>')
    for curve, colour in zip(curves, _COLOURS * len(curves), strict=False):
        for run in _runs(curve):
            upper = [f"{x(n):.1f},{y(curve.high[n] or 0.0):.1f}" for n in run]
            lower = [f"{x(n):.1f},{y(curve.low[n] or 0.0):.1f}" for n in reversed(run)]
            line = " ".join(f"{x(n):.1f},{y(curve.value[n] or 0.0):.1f}" for n in run)
            parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" fill-opacity="0.15"/>')
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    every = max(1, layers // 16)
    below = _HEIGHT - _MARGIN + 18
    parts += [f'<text x="{x(n):.1f}" y="{below}" text-anchor="middle">{n}</text>' for n in range(0, layers, every)]
    for value in (bottom, (bottom + top) / 2, top):
        parts.append(f'<text x="{_MARGIN - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 14}" text-anchor="middle">layer</text>')
    parts.append(
        f'<text x="16" y="{_HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {_HEIGHT / 2})">{label}</text>'
    )
    return "\n".join([*parts, "</svg>", ""])


def _runs(curve: Curve) -> list[list[int]]:
    """Layers with a score, in unbroken runs."""
    runs: list[list[int]] = [[]]
    for n, value in enumerate(curve.value):
        if value is None:
            runs.append([])
        else:
            runs[-1].append(n)
    return [run for run in runs if run]
