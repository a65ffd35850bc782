"""What a run folder says of its run: configuration, measured models, training, times. It is only read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.errors import DataError
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.reporting.metrics_log import Training, read_lines, training_of
from ballast.pipeline.run_folder import RunFolder
from ballast.pipeline.stage_graph import STAGES


@dataclass(frozen=True)
class Timing:
    """How long a finished stage took.

    Attributes:
        stage: its name.
        started: when, in UTC.
        seconds: how long.
        share: of all finished stages' time, in [0, 1].
    """

    stage: str
    started: str
    seconds: float
    share: float


@dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        folder: its folder.
        config: its configuration.
        models: by label, such as start and after GRPO, the parquet table of each measured model.
        summaries: their figures, in the same order; the first one is before, the last one after.
        trained_from: label of the model that training started from.
        training: the log of the stage `train`.
        timings: of the finished stages but `report`, in the order of a run.
        versions: of the training's packages.
    """

    folder: RunFolder
    config: RunConfig
    models: Mapping[str, Path]
    summaries: Mapping[str, EvaluationSummary]
    trained_from: str
    training: Training
    timings: tuple[Timing, ...]
    versions: Mapping[str, str]

    @property
    def rows(self) -> list[tuple[str, EvaluationSummary]]:
        """Labels and figures, as tables take them."""
        return list(self.summaries.items())

    @property
    def tuned(self) -> str:
        """Label of the trained model."""
        return f"after {self.config.train.method.upper()}"


def read_run(path: Path, config: RunConfig | None = None) -> RunRecord:
    """Read a run whose models are measured.

    Args:
        path: the run's folder.
        config: its configuration; None reads `config.yaml` there.

    Raises:
        ConfigError: that file is no configuration of this version.
        DataError: there is no run, a stage whose result is shown is not done, or a file of it cannot be read.
    """
    if config is None:
        if not (path / "config.yaml").is_file():
            raise DataError(
                f"'{path}' is no run folder: it has no config.yaml; give folders that `ballast run` has written, such as runs/demo"
            )
        config = load_config(path / "config.yaml")
    folder = RunFolder(path)
    models = measured_models(folder, config)
    summaries = {
        label: EvaluationSummary.from_json(at.with_suffix(".json").read_text(encoding="utf-8"))
        for label, at in models.items()
    }
    labels = list(models)
    return RunRecord(
        folder=folder,
        config=config,
        models=models,
        summaries=summaries,
        trained_from=labels[1] if config.align.enabled else labels[0],
        training=training_of(read_lines(path / "metrics.jsonl")),
        timings=_timings(folder),
        versions=folder.record("evaluate")["versions"],
    )


def measured_models(folder: RunFolder, config: RunConfig) -> dict[str, Path]:
    """The table of each measured model, with its figures as `.json` beside it; a repair that was kept is the last one.

    Raises:
        DataError: `baseline` or `evaluate` is not done.
    """
    evaluated = folder.stage("evaluate")
    models = {"start": folder.stage("baseline") / "start.parquet"}
    if config.align.enabled:
        models["after align"] = evaluated / "aligned.parquet"
    models[f"after {config.train.method.upper()}"] = evaluated / "final.parquet"
    if folder.has("restore") and folder.record("restore")["inputs"].get("train") == folder.digest("train"):
        repaired = folder.stage("restore")
        best = json.loads((repaired / "choice.json").read_text(encoding="utf-8"))["best"]
        if best is not None:
            models[f"repaired by {best}"] = repaired / f"{best}.parquet"
    return models


def _timings(folder: RunFolder) -> tuple[Timing, ...]:
    records: list[dict[str, Any]] = [folder.record(name) for name in STAGES if name != "report" and folder.has(name)]
    total = sum(record["seconds"] for record in records) or 1.0
    return tuple(
        Timing(
            record["stage"],
            record["started"].replace("T", " ").removesuffix("Z"),
            record["seconds"],
            record["seconds"] / total,
        )
        for record in records
    )
