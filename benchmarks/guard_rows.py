"""Weights and labels of training rows at a cut, and calibration: what both fits share."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from guard_data import Row
from scipy import optimize

# Total weight of a group, shared among its rows; 1 where nothing stands here.
GROUP_WEIGHT = {
    "gptfuzz_train": 6.0,
    "sampled_shipped_harmful": 2.0,
    "sampled_shipped_ordinary": 1.5,
    "sampled_shipped_scary": 1.5,
    "sampled_permissive_harmful": 1.5,
    "sampled_composed_harmful": 1.5,
    "sampled_composed_ordinary": 1.5,
    "refused_harmful": 1.5,
    "gsm8k_train_2k": 0.5,
    "off_topic": 0.5,
    "refused_ordinary": 0.5,
    "affirmed": 0.75,
    "turned": 0.75,
}


def row_weights(rows: list[Row], group_weight: Mapping[str, float] = GROUP_WEIGHT) -> npt.NDArray[np.float64]:
    """Weight of each row: its group's weight (1 where none is given) over the group's rows, 1 on average."""
    count = Counter(row.group for row in rows)
    weight = np.array([group_weight.get(row.group, 1.0) / count[row.group] for row in rows])
    return weight / weight.mean()


def label_at(row: Row, cut: int) -> float:
    """Label of a response up to `cut`: a refusal is safe until it turns."""
    return row.label if cut >= row.turn else 0.0


def certainty(row: Row, cut: int) -> float:
    """Weight of a position: the label of a whole response says less about its first words."""
    return 0.3 + 0.7 * min(1.0, cut / max(1, min(len(row.response), 160)))


def cross_entropy(
    logit: npt.NDArray[np.float64], label: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]
) -> float:
    return float(np.average(np.logaddexp(0, logit) - label * logit, weights=weight))


def calibrate(
    logit: npt.NDArray[np.floating], label: npt.NDArray[np.floating], weight: npt.NDArray[np.floating]
) -> tuple[float, float]:
    """Slope and offset of the logit that minimise cross-entropy (Platt 1999)."""
    result = optimize.minimize(
        lambda p: cross_entropy(p[0] * logit + p[1], label, weight), np.array([1.0, 0.0]), method="Nelder-Mead"
    )
    return float(result.x[0]), float(result.x[1])
