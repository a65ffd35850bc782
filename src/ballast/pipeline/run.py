"""A run: its stages one after the other, without those that are done.

Before the first stage starts, all that can be refused is refused: an unknown stage, a finished stage from
another configuration or from other data, a guard or a reward function that does not exist.

In processes that train together (`ballast.pipeline.ranks`) the main one looks, decides and writes, and all of them do what a
stage computes.
"""

import importlib
from collections.abc import Sequence

from rich.console import Console

from ballast.errors import ConfigError, DataError
from ballast.pipeline import ranks
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_loading import dump_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.launching import TRAINING, check_launch, launch_of_environment
from ballast.pipeline.model_record import hold_contract
from ballast.pipeline.run_checks import check_parts
from ballast.pipeline.run_folder import write_text
from ballast.pipeline.stage_graph import STAGES, planned, stage_inputs, stage_of, stage_settings


def run(
    config: RunConfig,
    stages: Sequence[str] | None = None,
    resume: bool = False,
    context: RunContext | None = None,
    live: bool = True,
) -> RunContext:
    """Run stages of a configuration, in order, in this process and those that a launcher started with it.

    A finished stage is not done again, `report` excepted. Without `stages`, all that a run consists of.

    Args:
        config: the run.
        stages: names of stages; None for the whole run.
        resume: go on in a run folder in which a stage was left unfinished; from its last checkpoint where it has some.
        context: shared parts from an earlier call, for callers that run several configurations.
        live: show a training as one table drawn anew, where the output is a terminal; a `context` has a setting of its own.

    Returns:
        The context, closed unless it was passed in.

    Raises:
        ConfigError: an unknown stage, guard or reward function, a run folder from another configuration or from data files
            that have changed, or several processes for a stage that does not train.
        DataError: a stage whose inputs are missing.
        MainProcessError: in a process that is not the main one, where that failed.
    """
    names = _planned(config, stages)
    _check_processes(config, names)
    ranks.join()
    own = context is None
    context = context or RunContext(config, live=live)
    try:
        ranks.on_main(lambda: _check(context, names, resume))
        ranks.on_main(lambda: _open_folder(context))
        if ranks.world() > 1:
            ranks.on_main(lambda: context.start_model)  # downloaded or converted once
        for name in names:
            _run_stage(context, name, resume)
    finally:
        if own:
            context.close()
    return context


def check_run(config: RunConfig, stages: Sequence[str], resume: bool = False) -> None:
    """Refuse what `run` would refuse before its first stage, and do nothing.

    Raises:
        ConfigError: as `run`.
        DataError: as `run`.
    """
    context = RunContext(config, Console(stderr=True, quiet=True), live=False)
    try:
        _check(context, _planned(config, stages), resume)
    finally:
        context.close()


def _check(context: RunContext, names: Sequence[str], resume: bool) -> None:
    _check_folder(context, resume)
    for i, name in enumerate(names):
        _check_stage(context, name, coming=names[:i])
    check_parts(context, [name for name in names if not _kept(context, name)])


def _check_processes(config: RunConfig, names: Sequence[str]) -> None:
    """Several processes train, or it is one."""
    processes = ranks.launched()
    alone = [name for name in names if name not in TRAINING]
    if processes == 1:
        return
    if alone:
        raise ConfigError(
            f"stage '{alone[0]}' was started in {processes} processes, and only {' and '.join(TRAINING)} are made for several: start "
            "`ballast run CONFIG --launch FILE` without accelerate or torchrun, which launches the stages that train and no others"
        )
    check_launch(config, names, launch_of_environment())


def _planned(config: RunConfig, stages: Sequence[str] | None) -> list[str]:
    """The stages of a call, in its order."""
    if stages is None:
        return planned(config)
    for name in stages:
        if name not in STAGES:
            raise ConfigError(f"no stage '{name}'; there are {', '.join(STAGES)}")
        if name == "align" and not config.align.enabled:
            raise ConfigError("stage 'align' is switched off (align.enabled = false); set align.enabled=true to run it")
    return list(stages)


def _kept(context: RunContext, name: str) -> bool:
    """Whether the stage is done and is not done again."""
    return context.folder.has(name) and not STAGES[name].repeats


def _check_stage(context: RunContext, name: str, coming: Sequence[str] = ()) -> None:
    """What a stage needs is there, or is made before it by this call, and all that is there is of this configuration.

    Raises:
        ConfigError: a finished stage was made with other settings or from other inputs.
        DataError: a stage that it needs is not done.
    """
    folder = context.folder
    missing = [need for need in stage_of(context.config, name).needs if not folder.has(need) and need not in coming]
    if missing and not _kept(context, name):
        raise DataError(
            f"stage '{name}' needs stage '{missing[0]}', which is not done in '{folder.path}'; run `ballast {missing[0]} CONFIG` first"
        )
    for need in stage_of(context.config, name).needs:
        if folder.has(need):
            _check_stage(context, need, coming)
    if _kept(context, name):
        folder.check_unchanged(name, stage_settings(context.config, name), stage_inputs(context, name))


def _run_stage(context: RunContext, name: str, resume: bool) -> None:
    folder = context.folder
    if ranks.on_main(lambda: _done(context, name)):
        return
    context.say(f"[bold]{name}[/]")
    module = importlib.import_module(f"ballast.pipeline.stages.{stage_of(context.config, name).module or name}")
    settings, inputs = stage_settings(context.config, name), stage_inputs(context, name)
    with folder.writing(name, settings, inputs, resume) as scratch:
        if "prompting" in settings:
            needs = [folder.stage(need) for need in stage_of(context.config, name).needs]
            ranks.on_main(lambda: hold_contract(scratch, needs, context.prompt_format))
        module.run_stage(context, scratch)
    seconds = folder.record(name)["seconds"]
    context.say(f"[dim]{name}: {seconds:.0f} s[/]")


def _done(context: RunContext, name: str) -> bool:
    """Whether a stage is kept as it is, all that it rests on being of this configuration."""
    _check_stage(context, name)  # again: a stage of this call may have made anew what a finished one was made from
    if not _kept(context, name):
        return False
    context.folder.remove_checkpoints(name)
    context.say(f"[dim]{name}: done before, kept[/]")
    return True


def _check_folder(context: RunContext, resume: bool) -> None:
    path = context.folder.path
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run folder '{path}' is a file; choose another name= or out=")
    unfinished = sorted(p.name.removesuffix(".partial") for p in path.glob("*.partial") if p.is_dir())
    if unfinished and not resume:
        raise ConfigError(
            f"run folder '{path}' holds an unfinished stage '{unfinished[0]}'; add --resume to go on with it, from its "
            "last checkpoint or else from its beginning, with the finished ones kept, or choose another name="
        )


def _open_folder(context: RunContext) -> None:
    path = context.folder.path
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "config.yaml", dump_config(context.config))
    except OSError as error:
        raise ConfigError(f"run folder '{path}' cannot be written ({error.strerror}); choose another out=") from error
