"""restore: repairs of the tuned model, each measured as it was; the safest that costs little is kept.

The tuned model and the one that training started from have been measured by `evaluate` (the latter by `baseline` where
`align` is off). Each repair is made from the weights alone, measured on the same prompts with the same seeds, and
removed again unless it is the best so far.

Writes `model/` (where a repair is kept), LABEL.json and LABEL.parquet of every repair, `table.md`, and `choice.json`.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ballast.errors import ConfigError, DataError
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_restore import LoxSweep, NLSRSweep, RestaSweep, RestoreConfig, SafeLoraSweep
from ballast.pipeline.context import RunContext
from ballast.pipeline.data import Row, draw
from ballast.pipeline.evaluation.measure import measure_model
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.evaluation.tables import markdown_table, render_tables
from ballast.pipeline.model_record import check_record
from ballast.pipeline.restoration.choice import Choice, choose
from ballast.pipeline.restoration.lox import Lox
from ballast.pipeline.restoration.methods import Method
from ballast.pipeline.restoration.models import Models, open_models
from ballast.pipeline.restoration.nlsr.calibration import calibration_rows
from ballast.pipeline.restoration.nlsr.realign import Realignment, realignment, selected
from ballast.pipeline.restoration.nlsr.settings import NLSRSettings
from ballast.pipeline.restoration.restore import check_device, restore
from ballast.pipeline.restoration.safe_lora import SafeLora
from ballast.pipeline.restoration.task_arithmetic import Resta
from ballast.pipeline.run_card import write_run_card
from ballast.pipeline.run_folder import write_text
from ballast.pipeline.stages.align import rows_with_answers


def run_stage(context: RunContext, folder: Path) -> None:
    """Try, measure, choose, keep.

    Raises:
        ModelError: the models cannot be compared, see `open_models`, or NLSR cannot run the aligned one.
    """
    settings = context.config.restore
    models = _models(context)
    start, tuned = _measured(context)
    repaired: dict[str, EvaluationSummary] = {}
    choice = Choice(None, {})
    for label, method in candidates(settings, lambda sweep: realigned(context, models, sweep)):
        made = folder / f"model-{label}"
        with context.progress(f"{label}: computing", len(models.tuned.names)) as done:
            restore(method, models, made, settings.device, on_tensor=lambda *_: done(1))
        repaired[label] = measure_model(context, str(made), folder, label)
        choice = choose(start, tuned, repaired, settings)
        _keep_only(folder, choice.best)
    # The generator may hold one of these by its folder's name, and another model will be in a folder of that name.
    context.forget_weights()
    if choice.best is not None:
        (folder / f"model-{choice.best}").replace(folder / "model")
        shown = {"before training": start, "tuned": tuned, "restored": repaired[choice.best]}
        write_run_card(context, folder / "model", "restore", shown)
    _report(context, folder, {"before training": start, "tuned": tuned, **repaired}, choice)


def check_settings(config: RunConfig) -> None:
    """What can be refused before the training whose result is repaired.

    Raises:
        ConfigError: there is no alignment to restore, or the device is not there.
        DataError: NLSR has no calibration rows.
    """
    settings = config.restore
    if settings.base is None and not config.align.enabled:
        raise ConfigError(
            "restore needs an alignment to restore, the difference of two models, and this run has none (align.enabled = false); "
            "give the model from before the alignment as restore.base, or set align.enabled=true"
        )
    check_device(settings.device)
    for sweep in settings.nlsr:
        calibration_data(config, sweep)


def candidates(settings: RestoreConfig, realign: Callable[[NLSRSweep], Realignment]) -> Iterator[tuple[str, Method]]:
    """Each method at each strength, with a label for its files; `realign` is called when the turn comes to NLSR."""
    for i, sweep in enumerate(settings.methods):
        again = "" if sweep.type not in [s.type for s in settings.methods[:i]] else f"-{i + 1}"
        match sweep:
            case LoxSweep():
                for alpha in sweep.alpha:
                    yield f"lox{again}-{alpha:g}", Lox(sweep.rank, alpha, sweep.modules)
            case SafeLoraSweep():
                for tau in sweep.tau:
                    yield f"safe-lora{again}-{tau:g}", SafeLora(tau, sweep.modules)
            case RestaSweep():
                for gamma in sweep.gamma:
                    yield f"resta{again}-{gamma:g}", Resta(gamma, sweep.modules)
            case NLSRSweep():
                found = realign(sweep)  # once: the strengths differ in how many layers are patched
                for share in sweep.share:
                    yield f"nlsr{again}-{share:g}", found.with_share(share)


def realigned(context: RunContext, models: Models, sweep: NLSRSweep) -> Realignment:
    """Safety neurons by the run's calibration rows, in the format that it trains in."""
    config = context.config
    own = config.restore.base is None  # the alignment is `align`'s LoRA, merged: its files no longer say its rank
    options = NLSRSettings(
        beta=sweep.beta,
        sparsity=sweep.sparsity,
        rank=sweep.rank or (config.align.lora.r if own else None),
        unit=sweep.unit,
        modules=sweep.modules,
    )
    check_record(models.aligned.folder, context.prompt_format)
    rows = calibration_rows(context.prompt_format, calibration_data(config, sweep), sweep.max_rows)
    with context.progress("nlsr: safety neurons", len(selected(models, options))) as done:
        return realignment(models, rows, options, config.restore.device, sweep.batch_size, on_module=lambda *_: done(1))


def calibration_data(config: RunConfig, sweep: NLSRSweep) -> list[Row]:
    """Harmful rows of `align.data`, none of which is measured on.

    Raises:
        DataError: there are none, or one is measured on.
    """
    rows = [row for row in rows_with_answers(config, config.align.data, "align.data", None) if row.kind == "harmful"]
    if not rows:
        raise DataError(
            "restore.methods has nlsr, which is calibrated on the harmful rows of align.data, and there are none; name a source "
            "of harmful prompts with safe answers there, or leave nlsr out"
        )
    return draw(rows, sweep.max_rows, config.seed)


def _models(context: RunContext) -> Models:
    settings = context.config.restore
    tuned = context.folder.stage("train") / "model"
    check_record(tuned, context.prompt_format)
    aligned = settings.aligned or context.reference_model
    return open_models(settings.base or context.start_model, aligned, str(tuned))


def _measured(context: RunContext) -> tuple[EvaluationSummary, EvaluationSummary]:
    """The model that training started from, and the tuned one."""
    evaluated = context.folder.stage("evaluate")
    before = evaluated / "aligned" if context.config.align.enabled else context.folder.stage("baseline") / "start"
    first, last = (
        EvaluationSummary.from_json(path.with_suffix(".json").read_text()) for path in (before, evaluated / "final")
    )
    return first, last


def _keep_only(folder: Path, best: str | None) -> None:
    """Of the models made so far only the best stays on the disk: each is as large as the tuned one."""
    for path in folder.glob("model-*"):
        if path.name != f"model-{best}":
            shutil.rmtree(path)


def _report(context: RunContext, folder: Path, rows: dict[str, EvaluationSummary], choice: Choice) -> None:
    table = list(rows.items())
    context.console.print(render_tables(table, context.console.width), highlight=False)
    lines = [f"{label} is out: {'; '.join(why)}" for label, why in choice.excluded.items() if why]
    lines.append(
        "no repair is safer than the tuned model within the limits; the tuned model stays as it is"
        if choice.best is None
        else f"kept: {choice.best}"
    )
    for line in lines:
        context.say(f"  {line}")
    write_text(folder / "table.md", f"{markdown_table(table)}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    write_text(folder / "choice.json", json.dumps({"best": choice.best, "excluded": choice.excluded}, indent=2))
