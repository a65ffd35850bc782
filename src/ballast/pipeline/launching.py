"""How several processes train: what a launch file says, and which runs it can carry.

Read against accelerate 1.15, whose files these are and which starts the processes; a contract test has it read every shipped
file (`tests/pipeline/distributed/test_launching.py`).
"""

import importlib.resources
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ballast.errors import ConfigError
from ballast.pipeline.config import RunConfig

TRAINING = ("align", "train")  # the stages that several processes make together

_SHIPPED = importlib.resources.files("ballast") / "configs" / "accelerate"

Kind = Literal["ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Launch:
    """How many processes, and how they divide the training among them.

    Attributes:
        kind: `ddp` holds the whole model in each; `fsdp1`, `fsdp2` and DeepSpeed's `zero1` to `zero3` hold parts of it, or of
            the optimizer.
        processes: how many, over all machines.
        path: the file for accelerate; None where the processes run already.
    """

    kind: Kind
    processes: int
    path: Path | None = None


def launch_files() -> list[str]:
    """Names of the shipped files, as `read_launch` takes them."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _SHIPPED.iterdir())


def read_launch(path: str, processes: int | None = None) -> Launch:
    """Read a file of accelerate's.

    Args:
        path: a YAML file as `accelerate config` writes it, or the bare name of a shipped one.
        processes: in place of the file's `num_processes`.

    Raises:
        ConfigError: there is no such file, or what it asks for is not known here.
    """
    shipped = path in launch_files()
    file = Path(str(_SHIPPED / f"{path}.yaml")) if shipped else Path(path).expanduser()
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--launch {path}: no launch file can be read there ({type(error).__name__}); give a file that `accelerate config` wrote, or "
            f"one of {', '.join(launch_files())}"
        ) from error
    if not isinstance(data, dict) or "distributed_type" not in data:
        raise ConfigError(f"--launch {path}: it has no distributed_type, so it is no file of `accelerate config`")
    count = data.get("num_processes") if processes is None else processes
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"--launch {path}: num_processes = {count!r}; give the number of processes by --processes")
    if (machines := data.get("num_machines", 1)) != 1:
        raise ConfigError(
            f"--launch {path}: num_machines = {machines}, and --launch starts processes on this machine alone; on each machine start "
            "`accelerate launch --config_file FILE -m ballast.pipeline.cli train CONFIG`, and the other stages on one (docs/distributed.md)"
        )
    return Launch(_kind_of_file(path, data), count, file)


def _kind_of_file(path: str, data: dict[str, Any]) -> Kind:
    kind = str(data["distributed_type"]).upper()
    if kind in ("MULTI_GPU", "NO"):  # NO is one process on one device
        return "ddp"
    if kind == "FSDP":
        return _kind("fsdp", (data.get("fsdp_config") or {}).get("fsdp_version", 1))
    if kind == "DEEPSPEED":
        return _kind("zero", (data.get("deepspeed_config") or {}).get("zero_stage", 2))
    raise ConfigError(
        f"--launch {path}: distributed_type = {data['distributed_type']} is not known here; take MULTI_GPU, FSDP or DEEPSPEED. Without a "
        "GPU, MULTI_GPU starts its processes on the CPU"
    )


def launch_of_environment() -> Launch:
    """How the launcher of this process has started it."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return Launch(_kind("fsdp", os.environ.get("FSDP_VERSION", "1")), processes)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return Launch(_kind("zero", os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")), processes)
    return Launch("ddp", processes)


def _kind(family: str, number: Any) -> Kind:
    kinds: dict[str, Kind] = {kind: kind for kind in ("fsdp1", "fsdp2", "zero1", "zero2", "zero3")}
    name = f"{family}{number}"
    if name not in kinds:
        raise ConfigError(f"a launch by {name} is not known here; there are ddp, {', '.join(kinds)}")
    return kinds[name]


def check_launch(config: RunConfig, stages: Sequence[str], launch: Launch) -> None:
    """Refuse runs that this launch cannot carry correctly.

    Args:
        config: the run.
        stages: those of them that train are looked at.
        launch: how they will be launched.

    Raises:
        ConfigError: names the key, the value, the reason and what to write instead.
    """
    trained = [name for name in stages if name in TRAINING]
    if launch.processes == 1 or not trained:
        return
    _check_batches(config, trained, launch.processes)
    _check_guards(config, trained)
    if launch.kind == "ddp":
        return
    for what, reason in (*_of_all(trained, launch.kind), *_of_config(config, trained)):
        raise ConfigError(
            f"{what} with a launch by {launch.kind}: {reason}. Launch it by ddp (--launch ddp), under which every safeguard works"
        )
    _check_machine(launch.kind)


def _check_guards(config: RunConfig, trained: Sequence[str]) -> None:
    """vLLM engines of several processes start together or wait for each other for ever; a guard's starts when it is first asked."""
    if "train" not in trained:
        return
    guards = {"guard": config.guard}
    if config.monitor.enabled:
        guards["judge" if config.monitor.judge is None else "monitor.judge"] = config.monitor.judge or config.judge
    for key, options in guards.items():
        if _inside_vllm(options.model_dump(mode="json")):
            raise ConfigError(
                f"{key}.engine.type = vllm in several processes: each would start a vLLM of its own beside its training, and all would wait "
                f"for each other; serve the guard by one vLLM server and set {key}.engine to server (docs/guard-engines.md), or take one_pass"
            )


def _inside_vllm(options: Any) -> bool:
    """Whether a guard, or one that it is made of, runs on vLLM inside the process."""
    if isinstance(options, list):
        return any(_inside_vllm(part) for part in options)
    if not isinstance(options, dict):
        return False
    engine = options.get("engine")
    return (isinstance(engine, dict) and engine.get("type") == "vllm") or any(map(_inside_vllm, options.values()))


def _of_all(trained: Sequence[str], kind: Kind) -> Iterator[tuple[str, str]]:
    """What no run can have where parameters are sharded."""
    if kind in ("fsdp1", "fsdp2", "zero3"):
        yield (
            f"stage '{trained[0]}'",
            "it shards the parameters, and what a run does with them takes them whole: the adapter and the merged model that it saves, "
            "checkpoints and turning back to them, the monitor's answers, and the weights that vLLM is sent",
        )


def _of_config(config: RunConfig, trained: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What cannot be correct where DeepSpeed's engine holds gradients and optimizer."""
    if "train" not in trained:
        return
    hidden = "its engine holds the gradients and updates the weights inside backward, where nothing can be added or projected"
    parts = "each process has a part of the optimizer's state, and a checkpoint of the run holds that of one process"
    for key, used, reason in (
        ("safegrad.enabled = true", config.safegrad.enabled, hidden),
        ("probing.enabled = true", config.probing.enabled, hidden),
        (f"regularization.l2_weight = {config.regularization.l2_weight}", config.regularization.l2_weight > 0, hidden),
        ("monitor.enabled = true", config.monitor.enabled, parts),
        (f"train.checkpoint_every = {config.train.checkpoint_every}", config.train.checkpoint_every is not None, parts),
    ):
        if used:
            yield key, reason


def _check_machine(kind: Kind) -> None:
    """Accelerate shards on GPUs alone: on a CPU it would train by DDP and not say so."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"a launch by {kind} on a machine without a GPU: accelerate knows it on GPUs alone; take --launch ddp"
        )
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"a launch by {kind}, and DeepSpeed is not installed: `pip install deepspeed`, or take --launch ddp"
        )


def _check_batches(config: RunConfig, stages: Sequence[str], processes: int) -> None:
    batches = {}
    if "align" in stages:
        batches["align.batch_size"] = config.align.batch_size
    if "train" in stages and config.train.method == "sft":
        batches["sft.batch_size"] = config.sft.batch_size
    elif "train" in stages:
        batches["train.prompts_per_step * train.group_size"] = config.train.prompts_per_step * config.train.group_size
    for key, rows in batches.items():
        if rows % processes:
            raise ConfigError(
                f"{key} = {rows} rows of an optimizer step cannot be shared out evenly among {processes} processes; make it a multiple of "
                f"{processes}"
            )


def micro_batch(rows: int, most: int, processes: int) -> tuple[int, int]:
    """Rows of a forward pass of one process, and how many passes make an optimizer step.

    The step has the same rows whatever the number of processes; where `most` does not divide a process's share of them, the
    largest number below it that does is taken.

    Args:
        rows: of an optimizer step, over all processes; a multiple of `processes`.
        most: rows of a pass, at most.
        processes: how many share the step.
    """
    own = rows // processes
    size = next(size for size in range(min(most, own), 0, -1) if own % size == 0)
    return size, own // size
