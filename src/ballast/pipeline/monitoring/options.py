"""What a SafetyMonitor may be asked for."""

from typing import Literal

from ballast.errors import ConfigError
from ballast.guardrails.types import Guardrail
from ballast.pipeline.monitoring.trip import MOST_SAMPLES

Action = Literal["rollback", "reduce_lr", "stop"]


def check_judge(judge: Guardrail, reward_guard: Guardrail | None, allowed: bool) -> None:
    """The judge is not the guardrail that rewards, unless that is allowed.

    Raises:
        ConfigError: it is.
    """
    if reward_guard is None or allowed:
        return
    if judge is reward_guard or judge.name == reward_guard.name:
        raise ConfigError(
            f"SafetyMonitor: judge and reward guard are both '{judge.name}'; a policy learns to please its guard, so measure with "
            "another one, or say allow_same_guard=True"
        )


def check_whole() -> None:
    """Each process that trains holds the whole model and the whole state of its optimizer.

    Raises:
        ConfigError: the training that begins divides them among its processes.
    """
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState

    kind = AcceleratorState().distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"SafetyMonitor in a training by {kind.value}: every process lets the model answer its share of the suite, and a good point is "
            "written by one process, so each must hold the whole of model and optimizer; train by DDP"
        )


def check_options(
    action: str, every_n_steps: int, lr_factor: float, cooldown: int, max_trips: int, samples: int
) -> None:
    """There is such an action, and all numbers are in range.

    Raises:
        ConfigError: the first that is not, by name.
    """
    if action not in ("rollback", "reduce_lr", "stop"):
        raise ConfigError(f"SafetyMonitor(action={action!r}): there are 'rollback', 'reduce_lr' and 'stop'")
    if not 0 < lr_factor <= 1:
        raise ConfigError(f"SafetyMonitor(lr_factor={lr_factor}): give a factor above 0 and at most 1")
    for name, value, least in (
        ("every_n_steps", every_n_steps, 1),
        ("cooldown", cooldown, 0),
        ("max_trips", max_trips, 0),
        ("samples", samples, 1),
    ):
        if value < least:
            raise ConfigError(f"SafetyMonitor({name}={value}): give {least} or more")
    if samples > MOST_SAMPLES:
        raise ConfigError(
            f"SafetyMonitor(samples={samples}): the test can compare at most {MOST_SAMPLES} answers to each prompt; ask for fewer, and for "
            "more prompts instead"
        )
