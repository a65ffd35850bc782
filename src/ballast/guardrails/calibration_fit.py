"""Fitting a calibration on labelled rows, and measuring it on rows of other prompts.

Shape letters: N labelled rows (several may share a prompt).
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from ballast.errors import DataError
from ballast.guardrails.calibration import Calibration, Method
from ballast.guardrails.reliability import Reliability, measure

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

HELD_OUT = 0.5  # share of the prompts that a report is measured on
_MIN_PROMPTS = 8  # of either label in either half: fewer say nothing about a shape
_TEMPERATURES = (0.02, 50.0)
_EDGE = 1e-6  # a risk of exactly 0 or 1 has no logit


class CalibrationReport(BaseModel):
    """How much a calibration helps on rows whose prompts took no part in fitting it.

    Attributes:
        before: figures of the risk as the guard gave it, on the held-out half.
        after: the same rows after the calibration, floor included.
        fitted_rows: rows that the map and the floor were fitted on.
        held_out_rows: rows that `before` and `after` are measured on.
        unscored: rows without a risk; they took part in nothing.
        benign_at_zero: share in [0, 1] of held-out benign rows whose calibrated risk is 0.
        unsafe_at_zero: share in [0, 1] of held-out unsafe rows whose calibrated risk is 0: what the floor hides.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: Reliability
    after: Reliability
    fitted_rows: int
    held_out_rows: int
    unscored: int
    benign_at_zero: float | None
    unsafe_at_zero: float


def fit_calibration(
    risk: Sequence[float | None],
    unsafe: Sequence[bool],
    *,
    prompts: Sequence[Hashable],
    guard: str,
    fingerprint: str,
    method: Method = "temperature",
    benign_quantile: float | None = 0.9,
    benign: Sequence[bool] | None = None,
    held_out: float = HELD_OUT,
    seed: int = 0,
) -> tuple[Calibration, CalibrationReport]:
    """Fit a calibration on one part of the rows and measure it on the other; no prompt is in both.

    Args:
        risk: (N,) the guard's risk in [0, 1]; None, unscored, is left out and counted.
        unsafe: (N,) what a person (or a better guard) said.
        prompts: (N,) the prompt of each row: rows of one prompt stay together, in the split and in the bootstrap.
        guard: the guard's name.
        fingerprint: `guard_fingerprint` of its options.
        method: temperature keeps the order and the gradations, and is the choice for rewards; isotonic follows
            the data more closely, and gives equal risk to whole ranges.
        benign_quantile: the floor is this quantile, in [0, 1), of the calibrated risk of benign rows, and so at
            least this share of them gets 0; None for no floor.
        benign: (N,) rows that the floor is chosen on, e.g. ordinary chat alone; None takes all that are not unsafe.
        held_out: share of the prompts that the report is measured on, in (0, 1).
        seed: of the split and the bootstrap.

    Raises:
        DataError: lists of different length, a risk outside [0, 1], too few prompts of either label in a part,
            no benign row to choose a floor on, or a risk that does not rise with harm.
    """
    import numpy as np

    _check_arguments(risk, unsafe, prompts, benign, benign_quantile, held_out)
    kept = [n for n, value in enumerate(risk) if value is not None]
    x = np.array([risk[n] for n in kept], dtype=float)
    y = np.array([unsafe[n] for n in kept], dtype=bool)
    plain = ~y if benign is None else np.array([benign[n] for n in kept], dtype=bool)
    group = _numbered([prompts[n] for n in kept])
    fit = _checked_split(y, group, held_out, seed)

    calibration = Calibration(guard=guard, fingerprint=fingerprint, method=method, **_fitted(x[fit], y[fit], method))
    if benign_quantile is not None:
        floor = _floor([calibration(value) for value in x[fit & plain]], benign_quantile)
        calibration = calibration.model_copy(update={"benign_floor": floor})
    mapped = np.array([calibration(value) for value in x[~fit]], dtype=float)
    rest = plain[~fit]
    report = CalibrationReport(
        before=measure(x[~fit], y[~fit], group[~fit], seed=seed),
        after=measure(mapped, y[~fit], group[~fit], seed=seed),
        fitted_rows=int(fit.sum()),
        held_out_rows=int((~fit).sum()),
        unscored=len(risk) - len(kept),
        benign_at_zero=float((mapped[rest] == 0).mean()) if rest.any() else None,
        unsafe_at_zero=float((mapped[y[~fit]] == 0).mean()),
    )
    return calibration, report


def _fitted(x: "npt.NDArray[np.float64]", y: "npt.NDArray[np.bool_]", method: Method) -> dict[str, Any]:
    if method == "temperature":
        temperature = _temperature(x, y)
        fields: dict[str, Any] = {"temperature": temperature}
        useless = temperature >= _TEMPERATURES[1] * 0.99
    else:
        knots = _knots(x, y)
        fields = {"knots": knots}
        useless = knots[-1][1] - knots[0][1] < _EDGE
    if useless:
        raise DataError(
            f"calibration by {method}: the guard's risk does not rise with the label 'unsafe' on the {len(x)} rows of the fit, "
            "so no monotone map can help; check that the labels are not the wrong way round, or use another guard"
        )
    return fields


def _temperature(x: "npt.NDArray[np.float64]", y: "npt.NDArray[np.bool_]") -> float:
    """T of the smallest mean cross-entropy, which is convex in 1 / T."""
    import numpy as np
    from scipy.optimize import minimize_scalar

    clipped = np.clip(x, _EDGE, 1 - _EDGE)
    logit = np.log(clipped) - np.log1p(-clipped)
    sign = np.where(y, -1.0, 1.0)

    def loss(inverse: float) -> float:
        return float(np.logaddexp(0.0, sign * logit * inverse).mean())

    bounds = (1 / _TEMPERATURES[1], 1 / _TEMPERATURES[0])
    return float(1 / minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def _knots(x: "npt.NDArray[np.float64]", y: "npt.NDArray[np.bool_]") -> tuple[tuple[float, float], ...]:
    """Both ends of every block of the isotonic regression; equal risks are pooled first."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    value, index, count = np.unique(x, return_inverse=True, return_counts=True)
    if len(value) < 2:
        raise DataError(
            f"calibration by isotonic: the guard gave the same risk {value[0]:.4g} to all {len(x)} rows; use another guard"
        )
    share = np.bincount(index, weights=y) / count
    solved = isotonic_regression(share, weights=count.astype(float))
    knots: list[tuple[float, float]] = []
    for start, end in zip(solved.blocks[:-1], solved.blocks[1:], strict=True):
        level = float(np.clip(solved.x[start], 0.0, 1.0))
        knots += [(float(value[edge]), level) for edge in dict.fromkeys((int(start), int(end) - 1))]
    return tuple(knots)


def _floor(benign: "Sequence[float | None]", quantile: float) -> float:
    import numpy as np

    if not benign:
        raise DataError(
            "the benign floor needs benign rows among those of the fit and there are none; mark some, or set benign_quantile to none"
        )
    # `higher` takes the risk of a row, so that at least this share lies at or below it.
    floor = float(np.quantile(np.array(benign, dtype=float), quantile, method="higher"))
    if floor >= 1.0:
        raise DataError(
            f"the {quantile} quantile of the calibrated risk of {len(benign)} benign rows is 1, so the floor would hide every harm; "
            "lower benign_quantile, or use another guard"
        )
    return floor


def check_labels(
    unsafe: Sequence[bool], prompts: Sequence[Hashable], *, held_out: float = HELD_OUT, seed: int = 0
) -> None:
    """Refuse rows that nothing can be fitted on, before a guard has judged them.

    Args:
        unsafe: (N,) the labels.
        prompts: (N,) the prompt of each row.
        held_out: as `fit_calibration` takes it.
        seed: as `fit_calibration` takes it.

    Raises:
        DataError: too few prompts of either label in a part.
    """
    import numpy as np

    _checked_split(np.array(unsafe, dtype=bool), _numbered(prompts), held_out, seed)


def _checked_split(
    y: "npt.NDArray[np.bool_]", group: "npt.NDArray[np.int64]", held_out: float, seed: int
) -> "npt.NDArray[np.bool_]":
    """True for rows of the fit; both parts hold enough of either label."""
    import numpy as np

    prompts = group.max(initial=-1) + 1
    order = np.random.default_rng(seed).permutation(prompts)
    fit: npt.NDArray[np.bool_] = np.isin(group, order[round(prompts * held_out) :])
    for part, name in ((fit, "fitting"), (~fit, "held-out")):
        _check_part(y[part], group[part], name)
    return fit


def _numbered(prompts: Sequence[Hashable]) -> "npt.NDArray[np.int64]":
    import numpy as np

    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([number[prompt] for prompt in prompts], dtype=np.int64)


def _check_arguments(
    risk: Sequence[float | None],
    unsafe: Sequence[bool],
    prompts: Sequence[Hashable],
    benign: Sequence[bool] | None,
    benign_quantile: float | None,
    held_out: float,
) -> None:
    lengths = {"risk": len(risk), "unsafe": len(unsafe), "prompts": len(prompts)}
    if benign is not None:
        lengths["benign"] = len(benign)
    if len(set(lengths.values())) > 1:
        raise DataError(f"calibration needs lists of one length; got {lengths}: give one value a row to each")
    for row, value in enumerate(risk):
        if value is not None and not 0.0 <= value <= 1.0:
            raise DataError(
                f"calibration: the risk of row {row} is {value}; it must lie in [0, 1], or be None for unscored"
            )
    if benign_quantile is not None and not 0.0 <= benign_quantile < 1.0:
        raise DataError(f"benign_quantile is {benign_quantile}; give a share in [0, 1), or none for no floor")
    if not 0.0 < held_out < 1.0:
        raise DataError(f"held_out is {held_out}; give a share of the prompts in (0, 1), usually 0.5")


def _check_part(y: "npt.NDArray[np.bool_]", group: "npt.NDArray[np.int64]", name: str) -> None:
    for label, rows in (("unsafe", group[y]), ("safe", group[~y])):
        if (found := len(set(rows.tolist()))) < _MIN_PROMPTS:
            raise DataError(
                f"calibration: the {name} part has {label} rows of {found} prompts and needs {_MIN_PROMPTS}; label more rows"
            )
