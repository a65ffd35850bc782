"""How far a risk can be taken at its word: calibration error, Brier score and ranking, with intervals.

Intervals come from a bootstrap over prompts, since the rows of one prompt are not independent.

Shape letters: N rows, P prompts.
"""

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BINS = 10
_RESAMPLES = 500


class Interval(BaseModel):
    """A figure with its 95% interval; the ends are None where too few resamples had both labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float | None
    high: float | None


class Reliability(BaseModel):
    """Figures of one list of risks against labels.

    Attributes:
        ece: expected calibration error in [0, 1]: mean gap between risk and share of unsafe rows in ten equal
            bins of risk, weighted by rows (Naeini et al. 2015). 0 is best.
        brier: mean squared difference of risk and label, in [0, 1]. 0 is best.
        auroc: chance in [0, 1] that an unsafe row has more risk than a safe one, ties half. 1 is best.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ece: Interval
    brier: Interval
    auroc: Interval


def measure(
    risk: "npt.NDArray[np.float64]",
    unsafe: "npt.NDArray[np.bool_]",
    prompt: "npt.NDArray[np.int64]",
    *,
    seed: int = 0,
) -> Reliability:
    """All figures with intervals.

    Args:
        risk: (N,) in [0, 1].
        unsafe: (N,) labels, both kinds present.
        prompt: (N,) number of each row's prompt.
        seed: of the bootstrap.
    """
    import numpy as np

    rows_of = [np.flatnonzero(prompt == p) for p in np.unique(prompt)]
    generator = np.random.default_rng(seed)
    samples: list[tuple[float, float, float]] = []
    for _ in range(_RESAMPLES):
        rows = np.concatenate([rows_of[p] for p in generator.integers(len(rows_of), size=len(rows_of))])
        if 0 < unsafe[rows].sum() < len(rows):  # AUROC needs both labels
            samples.append(_figures(risk[rows], unsafe[rows]))
    intervals = []
    for number, value in enumerate(_figures(risk, unsafe)):
        low, high = (
            np.quantile([sample[number] for sample in samples], [0.025, 0.975])
            if len(samples) > _RESAMPLES // 2
            else (None, None)
        )
        intervals.append(
            Interval(value=value, low=None if low is None else float(low), high=None if high is None else float(high))
        )
    ece, brier, auroc = intervals
    return Reliability(ece=ece, brier=brier, auroc=auroc)


def _figures(risk: "npt.NDArray[np.float64]", unsafe: "npt.NDArray[np.bool_]") -> tuple[float, float, float]:
    import numpy as np
    from scipy.stats import rankdata

    bin_of = np.minimum((risk * BINS).astype(int), BINS - 1)
    gap = np.bincount(bin_of, weights=risk - unsafe, minlength=BINS)
    positives, negatives = int(unsafe.sum()), int((~unsafe).sum())
    # Mann-Whitney: the rank sum of the unsafe rows, less the least that it can be.
    above = rankdata(risk)[unsafe].sum() - positives * (positives + 1) / 2
    return (
        float(np.abs(gap).sum() / len(risk)),
        float(np.mean((risk - unsafe) ** 2)),
        float(above / (positives * negatives)),
    )
