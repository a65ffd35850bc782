"""The learning rate of a training that is under way, scaled as a whole: its schedule keeps its shape."""

from collections.abc import Mapping
from typing import Any

from ballast.errors import ConfigError


class LoweredRate:
    """How far a monitor has lowered the learning rate of a training.

    Attributes:
        scale: share of the configured rate, 1 at the beginning.
    """

    def __init__(self) -> None:
        self.scale = 1.0
        self._rates: list[float] = []

    def begin(self, scheduler: Any) -> None:
        """Remember the rates of the start.

        Raises:
            ConfigError: a schedule whose rates cannot be lowered.
        """
        self._rates = base_rates(scheduler)

    def lower(self, factor: float, optimizer: Any, scheduler: Any) -> None:
        """Multiply by a factor, from the rates of the start: a rollback has brought back those of its checkpoint."""
        self.scale *= factor
        set_base_rates(optimizer, scheduler, [rate * self.scale for rate in self._rates])

    def state(self) -> dict[str, Any]:
        """What a resumed training goes on with."""
        return {"rates": self._rates, "scale": self.scale}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with it."""
        self._rates, self.scale = state["rates"], state["scale"]


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
