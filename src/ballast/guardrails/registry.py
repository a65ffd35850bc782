"""From a name or options to a guardrail: built-ins in a literal dict, others by entry point.

A package brings its own guard with an entry point of the group `ballast.guardrails`:

    [project.entry-points."ballast.guardrails"]
    my-guard = "my_package.guard:MyGuard"

Whatever that names is called with the options of the configuration as keyword arguments and must return a
`Guardrail`.
"""

import difflib
import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ballast.errors import BallastError, ConfigError, GuardError
from ballast.guardrails.licences import FAMILIES, UNKNOWN, Licence, licence_of_model, strictest
from ballast.guardrails.types import Guardrail

ENTRY_POINT_GROUP = "ballast.guardrails"

# type -> the guard's class, constructed with its options; importing it loads no weights and no torch.
BUILT_INS: dict[str, str] = {
    "calibrated": "ballast.guardrails.calibrated:calibrated_guard",
    "classifier": "ballast.guardrails.families.classifier:ClassifierGuard",
    "embedded": "ballast.guardrails.heads.embedded:EmbeddedGuard",
    "ensemble": "ballast.guardrails.families.ensemble:EnsembleGuard",
    "granite_guardian": "ballast.guardrails.families.granite:GraniteGuardian",
    "llama_guard": "ballast.guardrails.families.llama_guard:LlamaGuard",
    "moderation": "ballast.guardrails.families.moderation:ModerationGuard",
    "ngram": "ballast.guardrails.ngram:NgramGuard",
    "prompted": "ballast.guardrails.families.prompted:PromptedGuard",
    "qwen3guard": "ballast.guardrails.families.qwen3guard:Qwen3Guard",
    "qwen3guard_stream": "ballast.guardrails.heads.qwen3guard_stream:Qwen3GuardStream",
    "rules": "ballast.guardrails.rules:RulesGuard",
    "shieldgemma": "ballast.guardrails.families.shieldgemma:ShieldGemma",
}

OPTIONS: dict[str, str] = {
    "calibrated": "ballast.guardrails.calibrated:CalibratedOptions",
    "classifier": "ballast.guardrails.families.classifier:ClassifierOptions",
    "embedded": "ballast.guardrails.heads.embedded:EmbeddedOptions",
    "ensemble": "ballast.guardrails.families.ensemble:EnsembleOptions",
    "granite_guardian": "ballast.guardrails.families.granite:GraniteGuardianOptions",
    "llama_guard": "ballast.guardrails.families.llama_guard:LlamaGuardOptions",
    "moderation": "ballast.guardrails.families.moderation:ModerationOptions",
    "ngram": "ballast.guardrails.ngram:NgramOptions",
    "plugin": "ballast.guardrails.registry:PluginOptions",
    "prompted": "ballast.guardrails.families.prompted:PromptedOptions",
    "qwen3guard": "ballast.guardrails.families.qwen3guard:Qwen3GuardOptions",
    "qwen3guard_stream": "ballast.guardrails.heads.qwen3guard_stream:Qwen3GuardStreamOptions",
    "rules": "ballast.guardrails.rules:RulesOptions",
    "shieldgemma": "ballast.guardrails.families.shieldgemma:ShieldGemmaOptions",
}


class PluginOptions(BaseModel):
    """A guard that another package brings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["plugin"] = "plugin"
    name: str = Field(description="name of its entry point in the group `ballast.guardrails`")
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the guard, as its package documents them"
    )


def plugin_names() -> list[str]:
    """Names of the guards that installed packages bring, sorted."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)})


@dataclass(frozen=True)
class GuardEntry:
    """One guard that can be used here.

    Attributes:
        name: the type of a built-in guard, or the name of a plug-in.
        package: the distribution that brings it; "ballast" for the built-in ones.
        what: the first sentence of its class, or the entry point of a plug-in.
        licence: of the guard with its default options.
    """

    name: str
    package: str
    what: str
    licence: Licence


def describe_guards() -> list[GuardEntry]:
    """Every guard that can be used here, built-ins first.

    A built-in is described by its class; a plug-in by its entry point, so that listing runs no foreign code.
    """
    built_in = [
        GuardEntry(name, "ballast", (_imported(target).__doc__ or "").partition("\n")[0], _default_licence(name))
        for name, target in BUILT_INS.items()
    ]
    plugins = [
        GuardEntry(point.name, point.dist.name if point.dist else "", point.value, plugin_licence(point))
        for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    ]
    return [*built_in, *sorted(plugins, key=lambda entry: entry.name)]


def licence_of(options: BaseModel) -> Licence:
    """The licence that decides whether a guard may be a reward.

    Args:
        options: an options model of any guard. One made of other guards has the strictest licence of theirs, one with
            a `model` that of the model, a plug-in what its package states.

    Returns:
        The licence; `unknown` where the table does not hold it.
    """
    if isinstance(options, PluginOptions):
        points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        return next((plugin_licence(point) for point in points if point.name == options.name), UNKNOWN)
    if within := list(_guards_within(options)):
        return strictest(licence_of(guard) for guard in within)
    model = getattr(options, "model", None)
    kind = str(getattr(options, "type", ""))
    return licence_of_model(model) if isinstance(model, str) and kind not in FAMILIES else FAMILIES.get(kind, UNKNOWN)


def _guards_within(options: BaseModel) -> Iterator[BaseModel]:
    """Options of the guards that an ensemble or a calibrated guard asks."""
    for _, value in options:
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, BaseModel) and getattr(part, "type", None) in OPTIONS:
                yield part


def plugin_licence(point: importlib.metadata.EntryPoint) -> Licence:
    """What a plug-in's package states, read without importing it.

    It says nothing of the weights that the guard may load, so whether it may be a reward stays unknown.
    """
    if point.dist is None:
        return UNKNOWN
    metadata = point.dist.metadata
    stated = next((metadata[key] for key in ("License-Expression", "License") if key in metadata), UNKNOWN.name)
    note = f"the package {point.dist.name} states it; ask it about the guard's weights before it rewards"
    return Licence(stated.partition("\n")[0][:40], "unknown", note)


def _default_licence(kind: str) -> Licence:
    """The licence of a built-in guard before its options are known."""
    if kind in FAMILIES:
        return FAMILIES[kind]
    model = _imported(OPTIONS[kind]).model_fields.get("model")
    # A family is mostly named as its models are: granite_guardian, shieldgemma.
    named = model.default if model and isinstance(model.default, str) else kind.replace("_", "-")
    if model and (known := licence_of_model(named)) != UNKNOWN:
        return known
    return Licence(f"of its {'model' if model else 'guards'}", "unknown", "decided when its options are known")


def load_guardrail(what: BaseModel | Mapping[str, Any] | str, **overrides: Any) -> Guardrail:
    """Build a guardrail.

    Args:
        what: an options model; a mapping with the key `type`; the type of a built-in guard; or the name of
            an installed plug-in.
        overrides: single options that replace those of `what`.

    Returns:
        The guard. Its weights are loaded at its first use.

    Raises:
        ConfigError: an unknown name, or options that do not fit the guard.
        GuardError: a plug-in could not be loaded, or is no guardrail.
    """
    options = guard_options(what, overrides)
    if isinstance(options, PluginOptions):
        return _plugin(options)
    guard: Guardrail = _imported(BUILT_INS[str(getattr(options, "type", ""))])(options)
    return guard


def guard_options(what: BaseModel | Mapping[str, Any] | str, overrides: Mapping[str, Any] | None = None) -> BaseModel:
    """The options model that `what` stands for, as `load_guardrail` reads it; builds nothing.

    Raises:
        ConfigError: an unknown name, or options that do not fit the guard.
    """
    overrides = overrides or {}
    if isinstance(what, BaseModel):
        if not overrides and str(getattr(what, "type", "")) in OPTIONS:
            return what
        what = what.model_dump()
    if isinstance(what, str):
        if what not in BUILT_INS and what in plugin_names():
            return PluginOptions(name=what, options=dict(overrides))
        what = {"type": what}
    if not isinstance(what, Mapping):
        raise ConfigError(
            f"a guardrail is given by a name or by options; got {what!r}; write a mapping with the key 'type'"
        )
    settings = {**what, **overrides}
    if "type" not in settings:
        raise ConfigError(
            f"a guardrail's options need the key 'type'; got the keys {sorted(settings)}; set type to one of {', '.join(OPTIONS)}"
        )
    name = str(settings["type"])
    if name not in OPTIONS:
        raise _unknown(name)
    try:
        options: BaseModel = _imported(OPTIONS[name]).model_validate(settings)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or name}: {e['msg']}" for e in error.errors(include_url=False)
        )
        raise ConfigError(f"guardrail '{name}': {problems}") from error
    return options


# Options of a guard within another guard's options: any that `load_guardrail` takes, read as it reads them.
# Checked when a value arrives and not by the type, since a guard's options may again hold guards. The value is
# always an options model.
NestedGuardOptions = Annotated[Any, BeforeValidator(lambda what: guard_options(what))]


def _plugin(options: PluginOptions) -> Guardrail:
    points = [p for p in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP) if p.name == options.name]
    if not points:
        raise _unknown(options.name)
    if len(points) > 1:
        raise ConfigError(
            f"guardrail '{options.name}': {len(points)} packages bring one of this name ({', '.join(p.value for p in points)}); uninstall all but one"
        )
    target = points[0].value
    try:
        factory = points[0].load()
    except Exception as error:  # foreign code, which raises what it likes when it is imported
        raise GuardError(
            f"guardrail '{options.name}': {target} could not be loaded ({type(error).__name__}: {error}); reinstall its package"
        ) from error
    try:
        guard = factory(**options.options)
    except BallastError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"guardrail '{options.name}': {target} does not take these options ({error}); see its documentation"
        ) from error
    except Exception as error:
        raise GuardError(
            f"guardrail '{options.name}': {target} could not be made ({type(error).__name__}: {error}); see its documentation"
        ) from error
    if not isinstance(guard, Guardrail):
        raise GuardError(
            f"guardrail '{options.name}': {target} made a {type(guard).__name__} without `name` or `assess`; its package must return a Guardrail"
        )
    return guard


def _unknown(name: str) -> ConfigError:
    known = [*BUILT_INS, *plugin_names()]
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    return ConfigError(
        f"guardrail '{name}': no such guard, built in or installed{guess} Known: {', '.join(known)}. A package brings its own by an entry point of the group '{ENTRY_POINT_GROUP}'"
    )


def _imported(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
