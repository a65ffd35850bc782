"""From a score a layer to a range of layers, or to the reason why there is none.

L layers, from 0
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Band = tuple[int, int]  # first and last layer

_OPEN_SHARE = 0.1  # of the widest gap, from which a layer's gap counts as open
_GROWTH_SHARE = 0.1  # of the fastest growth, under which the gap has stopped growing


@dataclass(frozen=True)
class Curve:
    """One score a layer, with its 95% bootstrap band.

    Attributes:
        value: (L,) scores; None where a layer could not be scored.
        low: (L,) lower ends.
        high: (L,) upper ends.
    """

    value: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]


@dataclass(frozen=True)
class Choice:
    """A range of layers, or None and the reason."""

    band: Band | None
    reason: str


def band_of_gap(curve: Curve) -> Choice:
    """From where a gap opens and stays to where its smoothed growth stops (arXiv 2408.17003, section 3).

    Open is a layer whose lower end is above a tenth of the widest gap; growth is the difference of means over three
    layers, and it has stopped where it falls under a tenth of its fastest.
    """
    value = [v for v in curve.value if v is not None]
    low = [v for v in curve.low if v is not None]
    widest = max(value)
    if not any(v > 0 for v in low):
        return Choice(None, "the representations of harmful and harmless prompts do not part in any layer")
    closed = [n for n, v in enumerate(low) if v <= max(0.0, _OPEN_SHARE * widest)]
    first = closed[-1] + 1 if closed else 0
    if first == len(value):
        return Choice(None, "the gap closes again before the last layer")
    if first == 0:
        return Choice(
            None,
            "the gap is open from the first layer on: the prompts differ in their words, which says nothing of safety",
        )
    smooth = [statistics.fmean(value[max(0, n - 1) : n + 2]) for n in range(len(value))]
    growth = [0.0, *(after - before for before, after in itertools.pairwise(smooth))]
    fastest = max(range(first, len(value)), key=growth.__getitem__)
    ends = [n - 1 for n in range(fastest + 1, len(value)) if growth[n] < _GROWTH_SHARE * growth[fastest]]
    if not ends:
        return Choice(None, "the gap grows up to the last layer, so no range of layers stands out")
    return Choice((first, max(first, ends[0])), "from where the gap opens and stays to where it stops growing")


def band_of_drops(curve: Curve) -> Choice:
    """The adjoining layers without each of which refusals fall, with confidence; of several such runs the heaviest."""
    matters = [low is not None and low > 0 for low in curve.low]
    runs = [
        [n for n, _ in run] for is_run, run in itertools.groupby(enumerate(matters), lambda item: item[1]) if is_run
    ]
    if not runs:
        return Choice(None, "leaving out a layer lowers refusals with confidence nowhere")
    best = max(runs, key=lambda run: sum(curve.value[n] or 0.0 for n in run))
    return Choice((best[0], best[-1]), "adjoining layers without each of which refusals fall")


def stable_band(choices: Sequence[Choice], tolerance: int) -> Choice:
    """The median borders, where every seed found a band and the borders lie within `tolerance` layers of each other."""
    bands = [choice.band for choice in choices if choice.band is not None]
    if len(bands) < len(choices):
        missing = next(choice.reason for choice in choices if choice.band is None)
        return Choice(None, f"{len(choices) - len(bands)} of {len(choices)} seeds found no band: {missing}")
    firsts, lasts = zip(*bands, strict=True)
    if max(max(side) - min(side) for side in (firsts, lasts)) > tolerance:
        shown = ", ".join(f"{first} to {last}" for first, last in bands)
        return Choice(None, f"the seeds disagree by more than {tolerance} layers: {shown}")
    return Choice((statistics.median_low(firsts), statistics.median_low(lasts)), choices[0].reason)
