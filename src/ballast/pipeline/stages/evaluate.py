"""evaluate: the aligned and the final model on the same prompts, with the same seeds, as the baseline.

Writes `aligned.json` and `aligned.parquet` (where `align` is on), `final.json` and `final.parquet`.
"""

import json
from pathlib import Path

from ballast.pipeline.context import RunContext
from ballast.pipeline.evaluation.measure import measure_model


def run_stage(context: RunContext, folder: Path) -> None:
    """Measure what each training stage ended with."""
    if context.config.align.enabled:
        align = context.folder.stage("align")
        rate = json.loads((align / "training.json").read_text())["tokens_per_s"]
        measure_model(context, str(align / "model"), folder, "aligned", rate)
    train = context.folder.stage("train")
    rate = json.loads((train / "training.json").read_text())["tokens_per_s"]
    measure_model(context, str(train / "model"), folder, "final", rate)
