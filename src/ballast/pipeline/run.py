"""The stage graph: which stages there are, what each needs, and what is already done.

Before the first stage starts, all that can be refused is refused: an unknown stage, a finished stage from
another configuration or from other data, a guard or a reward function that does not exist.
"""

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape

from ballast.errors import ConfigError, DataError
from ballast.guardrails.registry import licence_of
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_loading import dump_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.model_record import hold_contract
from ballast.pipeline.run_folder import file_digests, write_text
from ballast.pipeline.safe_updates import safe_update_data


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        needs: stages whose output it reads; `align` only where it is enabled.
        reads: top-level keys of the configuration that its result depends on.
        data: keys of the data sources that it reads, as `section.key`.
        in_run: whether `ballast run` runs it without being asked.
        repeats: whether it is done again where it is done: it is instant, and shows its result.
        module: module of `stages/`; None is the one of the stage's name.
    """

    needs: tuple[str, ...]
    reads: tuple[str, ...]
    data: tuple[str, ...] = ()
    in_run: bool = True
    repeats: bool = False
    module: str | None = None


_POLICY = ("seed", "model", "prompting", "data")
_MEASURED = (*_POLICY, "generation", "guard", "judge", "segments", "shaping", "rewards", "evaluate")
_SAFE_UPDATES = ("safegrad", "freeze", "probing", "regularization")
_MONITORING = ("monitor", "judge", "evaluate")  # what a monitored training depends on besides
_MEASURING = ("baseline", "prompts", "evaluate", "restore")  # answers are measured in the format of serving
_TRAINING = ("data.train", "data.test")  # the test prompts too: none may be trained on

# In the order in which they run. Each is the module of that name in `stages/`; SFT takes `train_sft` for `train`.
STAGES: dict[str, Stage] = {
    "baseline": Stage(needs=(), reads=_MEASURED, data=("data.test",)),
    "align": Stage(needs=(), reads=(*_POLICY, "align"), data=("align.data", "data.test")),
    "prompts": Stage(needs=(), reads=(*_MEASURED, "prompts"), in_run=False),
    "localize": Stage(
        needs=("align",), reads=(*_POLICY, "align", "localize"), data=("localize.data", "data.test"), in_run=False
    ),
    "rollout": Stage(
        needs=("align",), reads=(*_POLICY, "align", "generation", "rollout"), data=_TRAINING, in_run=False
    ),
    "score": Stage(needs=("rollout",), reads=("prompting", "guard", "segments", "shaping"), in_run=False),
    "train": Stage(
        needs=("align",),
        reads=(*_POLICY, "align", "generation", "guard", "segments", "shaping", "rewards", "train", *_SAFE_UPDATES),
        data=_TRAINING,
    ),
    "evaluate": Stage(
        needs=("align", "train"), reads=(*_MEASURED, "align", "train", *_SAFE_UPDATES), data=("data.test",)
    ),
    "restore": Stage(
        needs=("align", "train", "evaluate"),
        reads=(*_MEASURED, "align", "train", "restore", *_SAFE_UPDATES),
        data=("data.test",),
        in_run=False,
    ),
    "report": Stage(needs=("baseline", "evaluate"), reads=("evaluate",), repeats=True),
}


def run(
    config: RunConfig,
    stages: Sequence[str] | None = None,
    resume: bool = False,
    context: RunContext | None = None,
    live: bool = True,
) -> RunContext:
    """Run stages of a configuration, in order, in this process.

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
        ConfigError: an unknown stage, guard or reward function, or a run folder from another configuration or
            from data files that have changed.
        DataError: a stage whose inputs are missing.
    """
    names = _planned(config, stages)
    own = context is None
    context = context or RunContext(config, live=live)
    try:
        _check_folder(context, resume)
        for i, name in enumerate(names):
            _check_stage(context, name, coming=names[:i])
        _check_parts(context, [name for name in names if not _kept(context, name)])
        _open_folder(context)
        for name in names:
            _run_stage(context, name, resume)
    finally:
        if own:
            context.close()
    return context


def stage_of(config: RunConfig, name: str) -> Stage:
    """A stage as this configuration has it: without `align` where that is off, and with what SFT reads and needs."""
    stage = STAGES[name]
    needs = tuple(need for need in stage.needs if need != "align" or config.align.enabled)
    stage = replace(stage, needs=needs, in_run=stage.in_run and (name != "align" or config.align.enabled))
    if name == "train":
        stage = replace(stage, needs=(*stage.needs, *_localized(config)), data=(*stage.data, *safe_update_data(config)))
    if name == "train" and config.monitor.enabled:
        suite = (
            () if config.monitor.suite is None else ("monitor.suite",)
        )  # else it is data.test, which train reads anyway
        stage = replace(stage, reads=(*stage.reads, *_MONITORING), data=(*stage.data, *suite))
    if name == "prompts":
        stage = _of_prompts(config, stage)
    if name == "localize":
        stage = replace(stage, in_run=bool(_localized(config)))
    if name == "restore":
        # The model that training started from is measured by `evaluate` where `align` is on, else by `baseline`.
        needs = stage.needs if config.align.enabled else ("baseline", *stage.needs)
        calibration = ("align.data",) if config.restore.nlsr else ()
        stage = replace(stage, needs=needs, data=(*stage.data, *calibration), in_run=config.restore.enabled)
    needs = stage.needs
    if config.train.method != "sft":
        return stage
    rollouts = config.sft.rows == "rollouts"
    match name:
        case "rollout" | "score":
            return replace(stage, in_run=rollouts)
        case "train" if rollouts:
            return replace(stage, needs=(*needs, "score"), reads=(*stage.reads, "sft"), module="train_sft")
        case "train":
            data = ("sft.data", *(key for key in stage.data if key != "data.train"))
            return replace(stage, reads=(*stage.reads, "sft"), data=data, module="train_sft")
        case "evaluate" | "restore":
            return replace(stage, reads=(*stage.reads, "sft"))
        case "prompts" if "train" in needs:
            return replace(stage, reads=(*stage.reads, "sft"))
        case _:
            return stage


def _of_prompts(config: RunConfig, stage: Stage) -> Stage:
    """What the stage `prompts` measures on, and what it needs of the training where it measures the tuned model."""
    stage = replace(stage, data=("data.test" if config.prompts.suite is None else "prompts.suite",))
    if config.prompts.model == "start":
        return stage
    needs = ("align", "train") if config.align.enabled else ("train",)
    return replace(stage, needs=needs, reads=(*stage.reads, "align", "train", *_SAFE_UPDATES))


def _localized(config: RunConfig) -> tuple[str, ...]:
    """The stage whose layers are frozen, where it is a stage that says which."""
    return ("localize",) if config.freeze.layers == "localized" else ()


def planned(config: RunConfig) -> list[str]:
    """The stages of a whole run, in order."""
    return [name for name in STAGES if stage_of(config, name).in_run]


def stage_settings(config: RunConfig, name: str) -> dict[str, Any]:
    """The part of a configuration that a stage's result depends on."""
    everything: dict[str, Any] = json.loads(config.model_dump_json())
    if name not in _MEASURING and not (name == "train" and config.monitor.enabled):
        # What is served may be chosen when the training is done.
        everything["prompting"] = {"system_prompt": config.prompting.system_prompt}
    return {key: everything[key] for key in stage_of(config, name).reads}


def stage_inputs(context: RunContext, name: str) -> dict[str, str]:
    """Digests of the finished stages and the data files that a stage reads, as far as they are there."""
    config, folder = context.config, context.folder
    stage = stage_of(config, name)
    digests = {need: folder.digest(need) for need in stage.needs if folder.has(need)}
    for key in stage.data:
        section, _, field = key.partition(".")
        digests |= file_digests(getattr(getattr(config, section), field))
    return digests


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


def _check_parts(context: RunContext, names: Sequence[str]) -> None:
    """Whatever the stages to come load by name exists; a guard's weights are loaded at its first use, not here.

    Raises:
        ConfigError: a guard or a reward function does not exist, or does not take its options.
        DataError: a training row lacks the answer that a task reward compares with.
        GuardError: a plug-in cannot be loaded.
    """
    read = {key for name in names for key in STAGES[name].reads}
    for part in ("guard", "judge"):
        if part in read:
            getattr(context, part)  # made, and kept, when it is asked for
    if "train" in names:
        _warn_of_licence(context)
        if context.config.train.method == "grpo":
            _check_rewards(context)
        _check_safety_rows(context)
    if "prompts" in names:
        from ballast.pipeline.evaluation.system_prompts import candidate_prompts
        from ballast.pipeline.stages.prompts import check_suite

        candidate_prompts(context.config)
        check_suite(context.config)
    if "restore" in names and context.config.restore.nlsr:
        from ballast.pipeline.stages.restore import calibration_data

        for sweep in context.config.restore.nlsr:
            calibration_data(context.config, sweep)


def _check_rewards(context: RunContext) -> None:
    """Reward functions can be imported, and every row has what they read."""
    from ballast.pipeline.data import training_rows
    from ballast.pipeline.task_rewards import columns_read, refusal_detector, task_rewards
    from ballast.rewards.terms import load_reward_function

    config = context.config
    for path in config.train.reward_functions:
        load_reward_function(path)
    task_rewards(config.rewards.task, tokenizer=None)
    refusal_detector(config.rewards, config.train)
    if columns := columns_read(config.rewards.task):
        training_rows(config.data, config.seed, columns)


def _check_safety_rows(context: RunContext) -> None:
    """The rows of the monitor and the safe updates that are on: they are there, and on the right side of the split."""
    config = context.config
    if config.monitor.enabled:
        from ballast.pipeline.monitoring.of_run import monitor_suite

        monitor_suite(config)
    if config.safegrad.enabled:
        from ballast.pipeline.safe_updates import safegrad_rows

        safegrad_rows(config)
    if config.probing.enabled:
        from ballast.pipeline.safety_layers import preference_rows

        preference_rows(config)
    if config.regularization.safety_share > 0:
        from ballast.pipeline.safety_layers import safety_rows
        from ballast.pipeline.stages.align import rows_with_answers

        safety_rows(config, rows_with_answers(config, config.sft.data, "sft.data", config.sft.max_rows))


def _warn_of_licence(context: RunContext) -> None:
    options = context.config.guard
    licence = licence_of(options)
    if licence.as_reward == "no":
        guard = escape(str(getattr(options, "model", options.type)))
        context.say(
            f"[yellow]warning: the guard '{guard}' is under the licence {licence.name}: {licence.note}. Training under it does "
            "that; take another guard (`ballast guard list --models`), or ask a lawyer[/]"
        )


def _run_stage(context: RunContext, name: str, resume: bool) -> None:
    folder = context.folder
    _check_stage(context, name)  # again: a stage of this call may have made anew what a finished one was made from
    if _kept(context, name):
        folder.remove_checkpoints(name)
        context.say(f"[dim]{name}: done before, kept[/]")
        return
    context.say(f"[bold]{name}[/]")
    module = importlib.import_module(f"ballast.pipeline.stages.{stage_of(context.config, name).module or name}")
    settings, inputs = stage_settings(context.config, name), stage_inputs(context, name)
    with folder.writing(name, settings, inputs, resume) as scratch:
        if "prompting" in settings:
            needs = stage_of(context.config, name).needs
            hold_contract(scratch, [folder.stage(need) for need in needs], context.prompt_format)
        module.run_stage(context, scratch)
    seconds = folder.record(name)["seconds"]
    context.say(f"[dim]{name}: {seconds:.0f} s[/]")


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
