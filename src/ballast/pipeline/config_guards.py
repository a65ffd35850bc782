"""Guards in a run's configuration: which there are, and what makes two of them the same."""

from typing import Annotated

from pydantic import BaseModel, Field

from ballast.guardrails.calibrated import CalibratedOptions
from ballast.guardrails.families.classifier import ClassifierOptions
from ballast.guardrails.families.ensemble import EnsembleOptions
from ballast.guardrails.families.granite import GraniteGuardianOptions
from ballast.guardrails.families.llama_guard import LlamaGuardOptions
from ballast.guardrails.families.moderation import ModerationOptions
from ballast.guardrails.families.prompted import PromptedOptions
from ballast.guardrails.families.qwen3guard import Qwen3GuardOptions
from ballast.guardrails.families.shieldgemma import ShieldGemmaOptions
from ballast.guardrails.families.verdict import VerdictOptions
from ballast.guardrails.heads.embedded import EmbeddedOptions
from ballast.guardrails.heads.qwen3guard_stream import Qwen3GuardStreamOptions
from ballast.guardrails.ngram import NgramOptions
from ballast.guardrails.registry import PluginOptions
from ballast.guardrails.rules import RulesOptions

GuardOptions = Annotated[
    CalibratedOptions
    | ClassifierOptions
    | EmbeddedOptions
    | EnsembleOptions
    | GraniteGuardianOptions
    | LlamaGuardOptions
    | ModerationOptions
    | NgramOptions
    | PluginOptions
    | PromptedOptions
    | Qwen3GuardOptions
    | Qwen3GuardStreamOptions
    | RulesOptions
    | ShieldGemmaOptions,
    Field(discriminator="type"),
]


# What tells two guards of one type apart, by type; `guard_identity` reads it.
DECIDES: dict[str, str] = {
    "classifier": "model",
    "granite_guardian": "model",
    "llama_guard": "model",
    "plugin": "name",
    "prompted": "model",
    "qwen3guard": "model",
    "qwen3guard_stream": "model",
    "rules": "patterns",
    "shieldgemma": "model",
}


def guard_identity(options: BaseModel) -> tuple[object, ...]:
    """What makes two guards the same one: not batch sizes, precision or templates, but what decides.

    Of a guard on a model that model, whatever its family, of a moderation endpoint its addresses and model, of a
    plug-in its name, of rules their patterns; of the others the type.
    """
    match options:
        case VerdictOptions() | ClassifierOptions() | Qwen3GuardStreamOptions():
            return "model", options.model
        case ModerationOptions():
            return options.type, *sorted(options.addresses), options.model
        case PluginOptions():
            return options.type, options.name
        case RulesOptions():
            return options.type, frozenset(rule.pattern for rule in options.patterns)
        case _:
            return (getattr(options, "type", None),)


def deciding_guards(options: BaseModel) -> dict[tuple[object, ...], str]:
    """Every guard that has a say, by identity, with its type: looks into ensembles and through calibrations."""
    match options:
        case EnsembleOptions():
            return {key: kind for member in options.members for key, kind in deciding_guards(member).items()}
        case CalibratedOptions():
            return deciding_guards(options.guard)
        case _:
            return {guard_identity(options): str(getattr(options, "type", ""))}
