"""baseline: how the start model answers the test prompts, before anything is changed.

Writes `start.json` (figures with intervals) and `start.parquet` (a row an answer), and with probes on `start-*.parquet`.
"""

from pathlib import Path

from ballast.pipeline.context import RunContext
from ballast.pipeline.evaluation.measure import measure_model


def run_stage(context: RunContext, folder: Path) -> None:
    """Measure the start model."""
    measure_model(context, context.start_model, folder, "start", further=True)
