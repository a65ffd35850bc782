"""The stage graph: which stages there are, what each needs, and what is already done."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ballast.errors import ConfigError, DataError
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_loading import dump_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.run_folder import write_text


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        needs: stages whose output it reads; `align` only where it is enabled.
        reads: top-level keys of the configuration that its result depends on.
        in_run: whether `ballast run` runs it without being asked.
    """

    needs: tuple[str, ...]
    reads: tuple[str, ...]
    in_run: bool = True


_POLICY = ("seed", "model", "prompting", "data")
_MEASURED = (*_POLICY, "generation", "guard", "judge", "segments", "rewards", "evaluate")

# In the order in which they run. Each is the module of that name in `stages/`.
STAGES: dict[str, Stage] = {
    "baseline": Stage(needs=(), reads=_MEASURED),
    "align": Stage(needs=(), reads=(*_POLICY, "align")),
    "rollout": Stage(needs=("align",), reads=(*_POLICY, "align", "generation", "rollout"), in_run=False),
    "score": Stage(needs=("rollout",), reads=("prompting", "guard", "segments", "shaping"), in_run=False),
    "train": Stage(
        needs=("align",), reads=(*_POLICY, "align", "generation", "guard", "segments", "shaping", "rewards", "train")
    ),
    "evaluate": Stage(needs=("align", "train"), reads=(*_MEASURED, "align", "train", "shaping")),
    "report": Stage(needs=("baseline", "evaluate"), reads=("evaluate",)),
}


def run(
    config: RunConfig, stages: Sequence[str] | None = None, resume: bool = False, context: RunContext | None = None
) -> RunContext:
    """Run stages of a configuration, in order, in this process.

    A finished stage is not done again. Without `stages`, all that a GRPO run consists of.

    Args:
        config: the run.
        stages: names of stages; None for the whole run.
        resume: go on in a run folder in which a stage was left unfinished.
        context: shared parts from an earlier call, for callers that run several configurations.

    Returns:
        The context, closed unless it was passed in.

    Raises:
        ConfigError: an unknown stage, or a run folder from another configuration.
        DataError: a stage whose inputs are missing.
    """
    names = [name for name, stage in STAGES.items() if stage.in_run] if stages is None else list(stages)
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise ConfigError(f"no stage '{unknown[0]}'; there are {', '.join(STAGES)}")
    own = context is None
    context = context or RunContext(config)
    try:
        _check_folder(context, resume)
        for name in names:
            _run_stage(context, name, asked=stages is not None)
    finally:
        if own:
            context.close()
    return context


def _run_stage(context: RunContext, name: str, asked: bool) -> None:
    config, folder = context.config, context.folder
    if name == "align" and not config.align.enabled:
        if asked:
            raise ConfigError("stage 'align' is switched off (align.enabled = false); set align.enabled=true to run it")
        return
    needs = [need for need in STAGES[name].needs if need != "align" or config.align.enabled]
    missing = [need for need in needs if not folder.has(need)]
    if missing:
        raise DataError(
            f"stage '{name}' needs stage '{missing[0]}', which is not done in '{folder.path}'; run `ballast {missing[0]} CONFIG` first"
        )
    inputs = {need: folder.digest(need) for need in needs}
    settings = stage_settings(config, name)
    if folder.has(name):
        folder.check_unchanged(name, settings, inputs)
        context.say(f"[dim]{name}: done before, kept[/]")
        return
    context.say(f"[bold]{name}[/]")
    module = importlib.import_module(f"ballast.pipeline.stages.{name}")
    with folder.writing(name, settings, inputs) as scratch:
        module.run_stage(context, scratch)
    seconds = folder.record(name)["seconds"]
    context.say(f"[dim]{name}: {seconds:.0f} s[/]")


def stage_settings(config: RunConfig, name: str) -> dict[str, Any]:
    """The part of a configuration that a stage's result depends on."""
    everything: dict[str, Any] = json.loads(config.model_dump_json())
    return {key: everything[key] for key in STAGES[name].reads}


def _check_folder(context: RunContext, resume: bool) -> None:
    path = context.folder.path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run folder '{path}' is a file; choose another name= or out=")
    unfinished = sorted(p.name.removesuffix(".partial") for p in path.glob("*.partial") if p.is_dir())
    if unfinished and not resume:
        raise ConfigError(
            f"run folder '{path}' holds an unfinished stage '{unfinished[0]}'; add --resume to begin that stage again with the "
            "finished ones kept, or choose another name="
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "config.yaml", dump_config(context.config))
    except OSError as error:
        raise ConfigError(f"run folder '{path}' cannot be written ({error.strerror}); choose another out=") from error
