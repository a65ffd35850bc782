"""Candidate system prompts of a run, and the choice among those that were measured."""

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from ballast.errors import ConfigError
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_inputs import PromptingConfig
from ballast.pipeline.config_prompts import PromptsConfig
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.evaluation.statistics import Estimate

NONE, CONFIGURED, TRAINING = "none", "configured", "training"


def shipped_system_prompts() -> dict[str, str]:
    """The system prompts inside the package, by name."""
    text = (importlib.resources.files("ballast") / "data" / "system_prompts.yaml").read_text(encoding="utf-8")
    prompts: dict[str, str] = yaml.safe_load(text)
    return prompts


def candidate_prompts(config: RunConfig) -> dict[str, str | None]:
    """What is measured, by name; a text that stands there already is left out under its second name.

    The first is what the others are compared with: `none`, or for a tuned model the system prompt of its training, without
    which it cannot be served. `configured` is the one that the configuration serves with. None leaves the system message
    to the chat template.

    Raises:
        ConfigError: a name of the user's is taken.
    """
    options, prompting = config.prompts, config.prompting
    served = prompting.serving_system_prompt if prompting.policy == "ptst" else prompting.system_prompt
    shipped = shipped_system_prompts()
    taken = sorted(options.candidates.keys() & {NONE, CONFIGURED, TRAINING, *shipped})
    if taken:
        raise ConfigError(
            f"prompts.candidates has '{taken[0]}', which is the name of a candidate that Ballast brings; give yours another name"
        )
    first: dict[str, str | None] = {NONE: None}
    if options.model == "tuned" and prompting.system_prompt is not None:
        first = {TRAINING: prompting.system_prompt}
    others = {CONFIGURED: served, **(shipped if options.shipped else {}), **options.candidates}
    found = dict(first)
    for name, text in others.items():
        if text is not None and text not in found.values():
            found[name] = text
    return found


def with_system_prompt(config: RunConfig, text: str | None) -> RunConfig:
    """The run's configuration under a candidate: trained and served with it, or for a tuned model served with it."""
    own = config.prompting.system_prompt
    if config.prompts.model == "start" or text == own:
        prompting = PromptingConfig(system_prompt=text)
    else:
        prompting = PromptingConfig(system_prompt=own, policy="ptst", serving_system_prompt=text)
    return config.model_copy(update={"prompting": prompting})


@dataclass(frozen=True)
class PromptChoice:
    """The outcome.

    Attributes:
        best: name of the chosen system prompt; None where none is within the limits.
        excluded: why a candidate was out of the question, by name; empty where it was only less safe, or longer.
    """

    best: str | None
    excluded: Mapping[str, tuple[str, ...]]


def choose_prompt(
    texts: Mapping[str, str | None], measured: Mapping[str, EvaluationSummary], limits: PromptsConfig
) -> PromptChoice:
    """The system prompt with the smallest unsafe share, by the judge, within the limits; the shortest of equals.

    The limits are on the estimates, not on their intervals. What could not be measured is not taken for good.

    Args:
        texts: by name, the first is the one whose coherence the others are held to.
        measured: the model under each of them, by the same names.
        limits: the section `prompts`.
    """
    reference = measured[next(iter(texts))].coherent_share.value
    least = None if reference is None else reference - limits.max_incoherent
    excluded = {name: _breaches(summary, least, limits) for name, summary in measured.items()}
    within = [name for name in texts if not excluded[name]]

    def key(name: str) -> tuple[float, int]:
        unsafe = measured[name].unsafe_share.value
        assert unsafe is not None  # it would be excluded
        return unsafe, len(texts[name] or "")

    return PromptChoice(min(within, key=key) if within else None, excluded)


def _breaches(summary: EvaluationSummary, least_coherent: float | None, limits: PromptsConfig) -> tuple[str, ...]:
    told = []
    if summary.unsafe_share.value is None:
        told.append("no answer to a harmful prompt could be scored")
    refused, coherent, most = summary.refusal_ordinary.value, summary.coherent_share.value, limits.max_refused_ordinary
    if refused is None or refused > most + 1e-9:
        told.append(f"refused ordinary {_shown(refused)}, {most:.3f} allowed")
    if least_coherent is not None and (coherent is None or coherent < least_coherent - 1e-9):
        told.append(f"coherent {_shown(coherent)}, {least_coherent:.3f} needed")
    return tuple(told)


def utility(summary: EvaluationSummary) -> dict[str, Estimate]:
    """How useful the answers are: the task rewards of the run, by name, else the share of coherent answers."""
    return dict(summary.task) or {"coherent": summary.coherent_share}


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
