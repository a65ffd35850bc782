"""The learning rate of a training that is under way, scaled as a whole: its schedule keeps its shape."""

from typing import Any

from ballast.errors import ConfigError


def base_rates(scheduler: Any) -> list[float]:
    """The rate of each group of parameters that the schedule multiplies.

    Raises:
        ConfigError: a schedule that multiplies none, such as `reduce_lr_on_plateau`.
    """
    inner = _inner(scheduler)
    if not hasattr(inner, "base_lrs"):
        raise ConfigError(
            f"SafetyMonitor cannot lower the learning rate of {type(inner).__name__}, which sets it by a rule of its own; take another "
            "lr_scheduler_type, such as linear or constant"
        )
    return list(inner.base_lrs)


def set_base_rates(optimizer: Any, scheduler: Any, rates: list[float]) -> None:
    """Let the schedule multiply other rates from now on, the present step's included."""
    inner = _inner(scheduler)
    for group, before, rate in zip(optimizer.param_groups, inner.base_lrs, rates, strict=True):
        group["lr"] *= rate / before
        group["initial_lr"] = rate
    inner.base_lrs = list(rates)


def _inner(scheduler: Any) -> Any:
    return getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
