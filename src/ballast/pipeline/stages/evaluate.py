"""evaluate: the aligned and the final model on the same prompts, with the same seeds, as the baseline.

Writes `aligned.json` and `aligned.parquet` (where `align` is on), `final.json` and `final.parquet`; and the figures into the
cards of the models.
"""

import json
from pathlib import Path

from ballast.pipeline.context import RunContext
from ballast.pipeline.evaluation.measure import measure_model
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.model_record import check_record
from ballast.pipeline.run_card import write_run_card


def run_stage(context: RunContext, folder: Path) -> None:
    """Measure what each training stage ended with.

    Raises:
        ModelError: a model is not what its stage has recorded.
    """
    stages = {"aligned": "align", "final": "train"} if context.config.align.enabled else {"final": "train"}
    trained = {label: context.folder.stage(stage) for label, stage in stages.items()}
    for made in trained.values():  # all of them before the first is measured
        check_record(made / "model", context.prompt_format)
    measured = measured_start(context)
    for label, made in trained.items():
        rate = json.loads((made / "training.json").read_text())["tokens_per_s"]
        measured[label] = measure_model(context, str(made / "model"), folder, label, rate)
        write_run_card(context, made / "model", "align" if label == "aligned" else "train", measured)


def measured_start(context: RunContext) -> dict[str, EvaluationSummary]:
    """The start model's figures by its label, where `baseline` is done."""
    if not context.folder.has("baseline"):
        return {}
    text = (context.folder.stage("baseline") / "start.json").read_text()
    return {"start": EvaluationSummary.from_json(text)}
