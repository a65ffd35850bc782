"""The calibrations of a run's guards, with the figures of their fit."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from ballast.errors import DataError
from ballast.guardrails.calibrated import CalibratedOptions
from ballast.guardrails.calibration import Calibration
from ballast.guardrails.calibration_fit import CalibrationReport
from ballast.guardrails.families.ensemble import EnsembleOptions
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_rewards import GuardRefusal
from ballast.pipeline.reporting.chart import Curves, Series

_GRID = 101  # risks that the drawn map is read at


@dataclass(frozen=True)
class ShownCalibration:
    """One calibration of a run.

    Attributes:
        roles: what its guards do in the run.
        file: its name.
        calibration: what was fitted; None where the file cannot be read any more.
        report: figures of the fit on held-out rows; None where there is no report beside the file.
        problem: why one of the two is missing.
    """

    roles: tuple[str, ...]
    file: str
    calibration: Calibration | None
    report: CalibrationReport | None
    problem: str = ""


def calibrations(config: RunConfig) -> list[ShownCalibration]:
    """Every calibration that a guard of the run carries, once. A file that is gone is told, and does not stop a report."""
    roles: dict[Path, list[str]] = {}
    for role, options in _guards(config):
        for path in _files(options):
            roles.setdefault(path, []).append(role)
    return [_read(path, tuple(dict.fromkeys(of))) for path, of in roles.items()]


def calibration_chart(shown: ShownCalibration, number: int) -> Curves | None:
    """The map from the guard's risk to the calibrated one; None where it could not be read."""
    calibration = shown.calibration
    if calibration is None:
        return None
    grid = [at / (_GRID - 1) for at in range(_GRID)]
    return Curves(
        name=f"calibration-{number}",
        title=f"Calibration of {calibration.guard}",
        y_label="calibrated risk",
        series=(
            Series(f"{calibration.method}, floor {calibration.benign_floor:.3f}", [(x, calibration(x)) for x in grid]),
            Series("as the guard gives it", [(0.0, 0.0), (1.0, 1.0)]),
        ),
        y_range=(0.0, 1.0),
        x_label="the guard's own risk",
    )


def _guards(config: RunConfig) -> Iterator[tuple[str, BaseModel]]:
    yield "rewards", config.guard
    yield "measures", config.judge
    if isinstance(config.rewards.refusal_by, GuardRefusal):
        yield "finds refusals", config.rewards.refusal_by.guard
    if config.monitor.enabled and config.monitor.judge is not None:
        yield "monitors", config.monitor.judge


def _files(options: BaseModel) -> Iterator[Path]:
    match options:
        case CalibratedOptions():
            yield Path(options.calibration).expanduser()
            yield from _files(options.guard)
        case EnsembleOptions():
            for member in options.members:
                yield from _files(member)


def _read(path: Path, roles: tuple[str, ...]) -> ShownCalibration:
    try:
        calibration = Calibration.load(path)
    except DataError as error:
        return ShownCalibration(roles, path.name, None, None, str(error))
    beside = path.with_suffix(".report.json")
    try:
        report = CalibrationReport.model_validate(json.loads(beside.read_text(encoding="utf-8"))["figures"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = (
            f"the figures of its fit cannot be shown: '{beside.name}' beside it cannot be read ({type(error).__name__})"
        )
        return ShownCalibration(roles, path.name, calibration, None, why)
    return ShownCalibration(roles, path.name, calibration, report)
