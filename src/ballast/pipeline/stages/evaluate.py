"""evaluate: the aligned and the final model on the same prompts, with the same seeds, as the baseline.

Writes `aligned.json` and `aligned.parquet` (where `align` is on), `final.json` and `final.parquet`.
"""

import json
from pathlib import Path

from ballast.pipeline.context import RunContext
from ballast.pipeline.evaluation.measure import measure_model
from ballast.pipeline.model_record import check_record


def run_stage(context: RunContext, folder: Path) -> None:
    """Measure what each training stage ended with.

    Raises:
        ModelError: a model is not what its stage has recorded.
    """
    stages = {"aligned": "align", "final": "train"} if context.config.align.enabled else {"final": "train"}
    trained = {label: context.folder.stage(stage) for label, stage in stages.items()}
    for made in trained.values():  # all of them before the first is measured
        check_record(made / "model", context.prompt_format)
    for label, made in trained.items():
        rate = json.loads((made / "training.json").read_text())["tokens_per_s"]
        measure_model(context, str(made / "model"), folder, label, rate)
