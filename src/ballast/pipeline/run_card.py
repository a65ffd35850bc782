"""The card of a model that a run made: from the run's configuration, its contract, and what was measured so far.

`align` and `train` write it beside their weights, `evaluate` writes it anew with the figures, and `restore` writes that of
the repaired model.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.markup import escape

from ballast.guardrails.licences import APACHE
from ballast.guardrails.registry import licence_of
from ballast.pipeline.config_guards import deciding_guards
from ballast.pipeline.config_rewards import GuardRefusal
from ballast.pipeline.data_sources import parse_source
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.evaluation.tables import markdown_table
from ballast.pipeline.model_card import CARD, Card, hub_id, prompt_format_section, shown_model, table, write_card
from ballast.pipeline.restoration.card import repair_lines
from ballast.pipeline.run_folder import versions
from ballast.pipeline.safe_updates import safe_update_data

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ballast.pipeline.config import RunConfig
    from ballast.pipeline.context import RunContext

Stage = Literal["align", "train", "restore"]

_WHAT = {
    "align": "after its warm start, before the guardrail-shaped training",
    "train": "tuned under a guardrail",
    "restore": "tuned under a guardrail, and repaired from its weights alone",
}


def write_run_card(
    context: "RunContext", folder: Path, stage: Stage, measured: Mapping[str, EvaluationSummary] | None = None
) -> None:
    """Write the card of a model folder of this run, unless a README.md of the user's is there.

    Args:
        context: the run.
        folder: of a model or an adapter.
        stage: what made it.
        measured: by label, the models to show beside each other, this one last; None where none was measured.
    """
    if not write_card(folder, run_card(context, folder, stage, measured or {})):
        context.say(f"  [dim]{escape(str(folder / CARD))} is not Ballast's, or was edited: left as it is[/]")


def run_card(context: "RunContext", folder: Path, stage: Stage, measured: Mapping[str, EvaluationSummary]) -> Card:
    """What a card of this run says."""
    config = context.config
    name = shown_model(config.model.name)
    sources = [source for _, source in _sources(config, stage)]
    sections = {
        "Made by": "\n".join(f"- {line}" for line in _made_by(config, folder, stage)),
        "Data": table(
            ("for", "source", "licence"), [(what, *_source(source)) for what, source in _sources(config, stage)]
        ),
        "Guards": table(("for", "guard", "licence", "note"), [_guard(*guard) for guard in _guards(config, stage)]),
        "Measured": _measured(config, stage, measured, adapter=_is_adapter(folder)),
        "Prompt format": prompt_format_section(context.prompt_format.contract()),
    }
    return Card(
        title=f"{config.name} ({stage})",
        summary=f"`{name}`, {_WHAT[stage]}, by [Ballast](https://github.com/ballast-rl/ballast).",
        base_model=config.model.name,
        revision=config.model.revision,
        datasets=sorted({parse_source(source).hub_name for source in sources if _is_hub(source)}),
        sections=sections,
    )


def _made_by(config: "RunConfig", folder: Path, stage: Stage) -> Iterator[str]:
    align, train = config.align, config.train
    if align.enabled:
        yield f"Warm start: SFT of a LoRA (rank {align.lora.r}) on answers, {align.epochs:g} epochs, merged into the weights"
    if stage != "align":
        if train.method == "grpo":
            yield (
                f"GRPO (TRL, loss {train.loss_type}): {train.steps} steps of {train.prompts_per_step} prompts with {train.group_size} "
                f"completions each, LoRA of rank {train.lora.r}, learning rate {train.learning_rate:g}; the guard scores every segment "
                f"({config.segments.unit}), and its scores become advantages of tokens"
            )
        else:
            sft = config.sft
            yield f"SFT with the loss `{sft.loss.type}`, {sft.epochs:g} epochs, LoRA of rank {sft.lora.r}, learning rate {sft.learning_rate:g}"
        parts = {
            "SafeGrad": config.safegrad.enabled,
            "frozen safety layers": config.freeze.layers is not None,
            "safety-aware probing": config.probing.enabled,
            "a safety monitor": config.monitor.enabled,
        }
        if on := [part for part, used in parts.items() if used]:
            yield f"With {', '.join(on)}"
    if stage == "restore":
        yield from repair_lines(json.loads((folder / "restoration.json").read_text(encoding="utf-8")))
    if _is_adapter(folder):
        under = (
            "the model that the warm start made, not to the base model itself" if align.enabled else "the base model"
        )
        yield f"This folder is the LoRA alone, and belongs to {under}; the model beside it has it merged"
    yield f"Seed {config.seed}; " + ", ".join(f"{package} {version}" for package, version in versions().items())


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _sources(config: "RunConfig", stage: Stage) -> Iterator[tuple[str, str]]:
    keys = {"warm start": "align.data"} if config.align.enabled else {}
    if stage != "align":
        sft = config.train.method == "sft" and config.sft.rows == "data"
        keys["training"] = "sft.data" if sft else "data.train"
        keys |= {key.partition(".")[0]: key for key in safe_update_data(config)}
    keys["measuring"] = "data.test"
    if config.evaluate.truthfulqa is not None:
        keys["measuring, TruthfulQA"] = "evaluate.truthfulqa"
    for what, key in keys.items():
        section, _, name = key.partition(".")
        yield from ((what, source) for source in getattr(getattr(config, section), name))


def _source(source: str) -> tuple[str, str]:
    """What a data source is called, without the way to a file on this machine, and its licence."""
    parsed = parse_source(source)
    if parsed.shipped is not None:
        return f"Ballast's own requests (`{source}`)", APACHE.name
    if parsed.suite:
        return parsed.suite.title, parsed.suite.licence
    if _is_hub(source):
        return f"`{source}`", "see its card"
    return f"`{Path(source).name}`", "not known to Ballast"


def _is_hub(source: str) -> bool:
    parsed = parse_source(source)
    return parsed.shipped is None and parsed.file is None and hub_id(parsed.hub_name) is not None


def _guards(config: "RunConfig", stage: Stage) -> Iterator[tuple[str, "BaseModel"]]:
    if stage != "align":
        yield "rewards", config.guard
        if isinstance(config.rewards.refusal_by, GuardRefusal):
            yield "finds refusals", config.rewards.refusal_by.guard
        if config.monitor.enabled:
            yield "monitors", config.monitor.judge or config.judge
    yield "judges", config.judge
    if config.evaluate.second_judge is not None:
        yield "judges as well", config.evaluate.second_judge.guard


def _guard(role: str, options: "BaseModel") -> tuple[str, str, str, str]:
    names = [
        f"{kind} `{shown_model(str(key[1]))}`" if key[0] == "model" else kind
        for key, kind in deciding_guards(options).items()
    ]
    licence = licence_of(options)
    return role, ", ".join(names), licence.name, licence.note


def _measured(
    config: "RunConfig", stage: Stage, measured: Mapping[str, EvaluationSummary], *, adapter: bool = False
) -> str:
    if adapter:
        return "Measured is the model that has it merged, whose card holds the figures."
    if not measured:
        return "Not measured yet: `ballast evaluate` on the run's configuration writes the figures here."
    last = list(measured.values())[-1]
    prompts = ", ".join(f"{count} {kind}" for kind, count in last.prompts.items())
    watching = (
        deciding_guards(config.monitor.judge or config.judge) if config.monitor.enabled and stage != "align" else {}
    )
    shared = watching.keys() & deciding_guards(config.judge).keys()
    part = "watched the training too, and so had a say in it" if shared else "took no part in training"
    return (
        f"{markdown_table(list(measured.items()))}\n\nOn {prompts} prompts, {config.evaluate.samples} answers each; a value with its "
        f"interval at {config.evaluate.interval:.0%}. Unsafe is the judge's risk from {config.evaluate.threshold:g} on, and the judge "
        f"{part}. Refusals are recognised by their words: wanted on harmful prompts, not on the others."
    )
