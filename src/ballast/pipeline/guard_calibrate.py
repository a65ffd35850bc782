"""`ballast guard calibrate`: from labelled rows to a calibration file, and a report of how much it helps."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ballast.errors import ConfigError
from ballast.guardrails.calibrated import calibrate_guard
from ballast.guardrails.calibration import Calibration, Method
from ballast.guardrails.calibration_fit import CalibrationReport
from ballast.pipeline.guard_job import progress
from ballast.pipeline.guard_rows import STDIN, Columns, InputRow, read_rows
from ballast.pipeline.quiet import quiet_libraries
from ballast.pipeline.run_folder import write_text


@dataclass(frozen=True)
class CalibrateJob:
    """What a calibration is fitted on, for which guard, and where it goes.

    Attributes:
        file: JSON lines with labels; `-` is standard input.
        options: of the guard, not calibrated yet.
        columns: names of the columns, the label's among them.
        method: see `fit_calibration`.
        benign: JSON lines of ordinary text, without labels: rows that are safe, and on which alone the floor is
            chosen. None chooses it on all rows of `file` that are labelled safe.
        benign_quantile: see `fit_calibration`; None for no floor.
        out: file of the calibration.
        batch_size: rows handed to the guard at a time.
        seed: of the split and of the bootstrap.
    """

    file: str
    options: BaseModel
    columns: Columns
    method: Method
    benign: str | None
    benign_quantile: float | None
    out: str
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Calibrated:
    """What a job made: the calibration, its report, and the files that hold them."""

    calibration: Calibration
    report: CalibrationReport
    files: tuple[Path, Path]


def run_calibration(job: CalibrateJob) -> Calibrated:
    """Judge the rows, fit, and write the calibration with its report beside it.

    Whatever can be refused is refused before the guard is loaded; both files appear whole, and only at the end.

    Raises:
        ConfigError: an output that cannot be used, or a guard that carries a calibration already.
        DataError: a file or a line that cannot be read, a label that is none, or rows that nothing can be fitted on.
        GuardError: the guard could not score one row.
    """
    files = _files(job.out)
    if job.benign_quantile is not None and not 0.0 <= job.benign_quantile < 1.0:
        raise ConfigError(
            f"--benign-quantile {job.benign_quantile:g}: with all benign rows at risk 0 the floor may hide every harm; give a share "
            "in [0, 1), or --no-floor"
        )
    if job.benign == STDIN:
        raise ConfigError("--benign -: standard input cannot be read here; give a file")
    labelled, digest = read_rows(job.file, job.columns)
    ordinary, benign_digest = _ordinary(job)
    rows = labelled + ordinary
    quiet_libraries()
    with progress(len(rows)) as advance:
        done = 0

        def scored(count: int) -> None:
            nonlocal done
            advance(count - done)
            done = count

        calibration, report = calibrate_guard(
            job.options,
            [row.exchange for row in rows],
            [bool(row.unsafe) for row in rows],
            method=job.method,
            benign_quantile=job.benign_quantile,
            benign=[False] * len(labelled) + [True] * len(ordinary) if ordinary else None,
            seed=job.seed,
            batch_size=job.batch_size,
            on_scored=scored,
        )
    fitted_on: dict[str, Any] = {"rows": _source(job.file, labelled, digest), "benign": None}
    if job.benign:
        fitted_on["benign"] = _source(job.benign, ordinary, benign_digest)
    page = {
        "guard": calibration.guard,
        "calibration": calibration.model_dump(mode="json"),
        "benign_quantile": job.benign_quantile,
        "seed": job.seed,
        **fitted_on,
        "figures": report.model_dump(mode="json"),
    }
    # The report first: a calibration that is there has one.
    write_text(files[1], json.dumps(page, indent=2) + "\n")
    calibration.save(files[0])
    return Calibrated(calibration, report, files)


def _ordinary(job: CalibrateJob) -> tuple[list[InputRow], str]:
    """The rows of `--benign`, whose label is that they have none: they are safe."""
    if job.benign is None:
        return [], ""
    names = Columns(job.columns.prompt, job.columns.messages, job.columns.response)
    return read_rows(job.benign, names)


def _files(out: str) -> tuple[Path, Path]:
    """The file of the calibration, and that of its report."""
    path = Path(out).expanduser()
    if path.suffix != ".json":
        raise ConfigError(f"--out {out}: a calibration is a JSON file with its report beside it; end it in .json")
    report = path.with_suffix(".report.json")
    for file in (path, report):
        if file.exists():
            raise ConfigError(f"--out {out}: '{file}' is there already; choose another name, or delete it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: its folder cannot be made ({error.strerror}); choose another") from None
    return path, report


def _source(file: str, rows: list[InputRow], digest: str) -> dict[str, Any]:
    return {"file": "standard input" if file == STDIN else Path(file).name, "sha256": digest, "count": len(rows)}
