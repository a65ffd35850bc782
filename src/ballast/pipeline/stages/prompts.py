"""prompts: one model under candidate system prompts, each measured as `evaluate` measures, and the one to take.

The start model is measured for a prompt to train and to serve with, the tuned one for a prompt to serve with alone.

Writes prompt-NAME.json and prompt-NAME.parquet of every candidate, `prompts.json`, `table.md`, `prompts.svg`, and
`chosen.yaml`: the run's configuration with the chosen system prompt, where there is one.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from ballast.errors import DataError
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_loading import dump_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.data import held_out_suite
from ballast.pipeline.evaluation.intervals_figure import intervals_figure
from ballast.pipeline.evaluation.measure import measure_model, read_verdicts
from ballast.pipeline.evaluation.metrics import Comparison, EvaluationSummary, compare
from ballast.pipeline.evaluation.system_prompts import (
    PromptChoice,
    candidate_prompts,
    choose_prompt,
    utility,
    with_system_prompt,
)
from ballast.pipeline.evaluation.tables import markdown_table, render_tables
from ballast.pipeline.model_record import check_record
from ballast.pipeline.run_folder import write_text
from ballast.pipeline.stages.report import describe


def run_stage(context: RunContext, folder: Path) -> None:
    """Measure each, choose, write down.

    Raises:
        ConfigError: a candidate's name is taken.
        ModelError: the tuned model is not what its stage has recorded, or its chat template takes no system message.
    """
    config = context.config
    texts = candidate_prompts(config)
    model = context.start_model
    if config.prompts.model == "tuned":
        tuned = context.folder.stage("train") / "model"
        check_record(tuned, context.prompt_format)
        model = str(tuned)
    measured: dict[str, EvaluationSummary] = {}
    for name, text in texts.items():
        with context.configured(_measuring(with_system_prompt(config, text))):
            measured[name] = measure_model(context, model, folder, _label(name))
    choice = choose_prompt(texts, measured, config.prompts)
    verdicts = {name: read_verdicts(folder / f"{_label(name)}.parquet") for name in texts}
    first = next(iter(texts))
    compared = {
        name: compare(verdicts[first], verdicts[name], config.seed, config.evaluate.interval)
        for name in texts
        if name != first
    }
    _report(context, folder, texts, measured, choice, compared)


def check_suite(config: RunConfig) -> None:
    """There is something to choose by.

    Raises:
        DataError: the suite has no harmful or no ordinary prompt.
    """
    suite = held_out_suite(_measuring(config).data)
    for kind in ("harmful", "ordinary"):
        if not suite.of_kind(kind):
            key = "data.test" if config.prompts.suite is None else "prompts.suite"
            raise DataError(
                f"{key} has no {kind} prompt, and a system prompt is chosen by harmful and by ordinary ones; name a source of them there"
            )


def _measuring(config: RunConfig) -> RunConfig:
    """The configuration whose test prompts are the suite."""
    if config.prompts.suite is None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"test": config.prompts.suite})})


def _label(name: str) -> str:
    return f"prompt-{name}"  # no name of a candidate is that of a file of the stage


def _report(
    context: RunContext,
    folder: Path,
    texts: Mapping[str, str | None],
    measured: Mapping[str, EvaluationSummary],
    choice: PromptChoice,
    compared: Mapping[str, Comparison],
) -> None:
    config, first = context.config, next(iter(texts))
    table = list(measured.items())
    context.console.print(render_tables(table, context.console.width), highlight=False)
    lines = [describe(f"{first} -> {name}", comparison) for name, comparison in compared.items()]
    lines += [f"{name} is out: {'; '.join(why)}" for name, why in choice.excluded.items() if why]
    lines.append("no system prompt is within the limits" if choice.best is None else f"chosen: {choice.best}")
    for line in lines:
        context.say(f"  {line}")
    write_text(folder / "table.md", f"{markdown_table(table)}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    record = {
        "model": config.prompts.model,
        "compared_with": first,
        "best": choice.best,
        "candidates": {
            name: {
                "system_prompt": texts[name],
                **_figures(summary),
                "excluded": choice.excluded[name],
                "change": asdict(compared[name]) if name in compared else None,
            }
            for name, summary in measured.items()
        },
    }
    write_text(folder / "prompts.json", json.dumps(record, indent=2, ensure_ascii=False))
    rows = {
        name: {
            "unsafe, of harmful": summary.unsafe_share,
            "refused, of ordinary": summary.refusal_ordinary,
            **utility(summary),
        }
        for name, summary in measured.items()
    }
    title = f"System prompts, {config.prompts.model} model, {config.evaluate.interval:.0%} intervals"
    write_text(folder / "prompts.svg", intervals_figure(rows, title, choice.best))
    if choice.best is not None:
        write_text(folder / "chosen.yaml", dump_config(with_system_prompt(config, texts[choice.best])))
        chosen = context.folder.path / "prompts" / "chosen.yaml"
        context.say(f"  the configuration with it: {escape(str(chosen))}")


def _figures(summary: EvaluationSummary) -> dict[str, Any]:
    return {
        "unsafe_share": asdict(summary.unsafe_share),
        "mean_risk": asdict(summary.mean_risk),
        "refused_ordinary": asdict(summary.refusal_ordinary),
        "refused_scary": asdict(summary.refusal_scary),
        "utility": {name: asdict(estimate) for name, estimate in utility(summary).items()},
    }
