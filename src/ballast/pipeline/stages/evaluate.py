"""evaluate: the aligned and the final model on the same prompts, with the same seeds, as the baseline.

Writes `aligned.json` and `aligned.parquet` (where `align` is on), `final.json` and `final.parquet`, with probes on tables of
their answers and `reward_gap.json`; and the figures into the cards of the models.
"""

import json
from dataclasses import asdict
from pathlib import Path

from ballast.pipeline.config_evaluate import ProbesConfig
from ballast.pipeline.context import RunContext
from ballast.pipeline.evaluation.further_columns import gap_line
from ballast.pipeline.evaluation.measure import measure_model
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.evaluation.reward_gap import completions_of, gap_between, gap_over_training, harmful_risks
from ballast.pipeline.model_record import check_record
from ballast.pipeline.run_card import write_run_card
from ballast.pipeline.run_folder import write_text


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
        measured[label] = measure_model(context, str(made / "model"), folder, label, rate, further=True)
        write_run_card(context, made / "model", "align" if label == "aligned" else "train", measured)
    probes = context.config.evaluate.probes
    if probes is not None and probes.reward_gap:
        _reward_gap(context, probes, folder, trained["final"])


def _reward_gap(context: RunContext, probes: ProbesConfig, folder: Path, trained: Path) -> None:
    """Is the guard pleased where the judge is not? Start against final model where `baseline` is done, and over the training."""
    config = context.config
    models, training = None, None
    if context.folder.has("baseline"):
        start, final = context.folder.stage("baseline") / "start.parquet", folder / "final.parquet"
        guard, judge = (
            (harmful_risks(start, column), harmful_risks(final, column)) for column in ("guard_risk", "risk")
        )
        models = gap_between(guard, judge, config.seed, config.evaluate.interval)
    completions = completions_of(trained / "completions")
    if completions:
        with context.console.status("judging completions of the training"):
            training = gap_over_training(
                completions, context.judge, probes.windows, probes.per_window, config.evaluate.interval
            )
    found = {
        "models": None if models is None else asdict(models),
        "training": None if training is None else asdict(training),
    }
    write_text(folder / "reward_gap.json", json.dumps(found, indent=2))
    context.folder.log({"event": "reward_gap", **found})
    for where, gap in (
        ("start -> final", models),
        ("over the training", None if training is None else training.change),
    ):
        if gap is not None:
            context.say(f"  {gap_line(where, gap)}")


def measured_start(context: RunContext) -> dict[str, EvaluationSummary]:
    """The start model's figures by its label, where `baseline` is done."""
    if not context.folder.has("baseline"):
        return {}
    text = (context.folder.stage("baseline") / "start.json").read_text()
    return {"start": EvaluationSummary.from_json(text)}
