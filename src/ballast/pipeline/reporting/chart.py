"""What a chart shows, apart from how it is drawn: plain data that tests can look at.

Curves      figures over the optimizer steps of a training, with what a monitor did marked
Intervals   one figure of several models beside each other, with its interval
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ballast.pipeline.evaluation.statistics import Estimate

Points = Sequence[tuple[float, float | None]]

MOST_POINTS = 400  # of a drawn line: more are not told apart, and would make the file large


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: in the legend.
        points: (x, y); None is a gap.
        ends: (low, high) of each point's interval, None where there is none; empty for a line without intervals.
        joined: a line through the points; false shows the points alone.
    """

    label: str
    points: Points
    ends: Sequence[tuple[float, float] | None] = ()
    joined: bool = True


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: float
    kind: Literal["trip", "rollback", "slower", "evaluation"]
    text: str


@dataclass(frozen=True)
class Curves:
    """Figures over steps.

    Attributes:
        name: of its files: letters and dashes.
        title: above it.
        y_label: what is on the vertical axis, with its unit.
        series: the lines.
        marks: what happened meanwhile.
        levels: (y, label) of horizontal lines.
        y_range: the vertical axis where it does not follow the data.
        x_label: what is on the horizontal axis.
    """

    name: str
    title: str
    y_label: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    levels: tuple[tuple[float, str], ...] = ()
    y_range: tuple[float, float] | None = None
    x_label: str = "optimizer step"


@dataclass(frozen=True)
class Intervals:
    """Figures of models beside each other: a panel a figure, a row a model.

    Attributes:
        name: of its files.
        title: above it.
        models: the rows.
        panels: by figure, an estimate a model; None where the model has none.
    """

    name: str
    title: str
    models: tuple[str, ...]
    panels: dict[str, tuple[Estimate | None, ...]]


Chart = Curves | Intervals


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most so many points, each the mean of as many neighbours; a group without any value is a gap.

    Returns:
        The points themselves where there are few enough. x is the last one of a group, so that nothing appears to
        happen before it did.
    """
    if len(points) <= most:
        return points
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], _mean([y for _, y in group if y is not None])) for group in groups]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
