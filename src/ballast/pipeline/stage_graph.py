"""The stage graph: which stages there are, what each needs and reads, and which of them a configuration runs."""

import json
from dataclasses import dataclass, replace
from typing import Any

from ballast.pipeline.config import RunConfig
from ballast.pipeline.context import RunContext
from ballast.pipeline.run_folder import file_digests
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
    "report": Stage(needs=("baseline", "evaluate"), reads=("evaluate", "report"), repeats=True),
}


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
    if name in ("baseline", "evaluate") and config.evaluate.truthfulqa is not None:
        stage = replace(stage, data=(*stage.data, "evaluate.truthfulqa"))
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
    if name not in ("baseline", "evaluate"):
        # What only those two measure; a monitored training samples and judges as they do, and nothing more.
        for key in ("probes", "truthfulqa", "truthfulqa_max"):
            everything["evaluate"].pop(key)
    if name == "train":
        for key in ("second_judge", "pass_at"):
            everything["evaluate"].pop(key)
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
