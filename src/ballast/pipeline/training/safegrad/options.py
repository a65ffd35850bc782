"""What SafeGrad can be told; `SafeGrad` says what each option means."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from ballast.errors import ConfigError
from ballast.pipeline.training.safegrad.safety_loss import Objective

_CHOICES: dict[str, tuple[Any, ...]] = {
    "projection": ("global", "none"),
    "metric": ("euclidean", "adam"),
    "mode": ("project", "trust_region", "watchdog"),
    "objective": ("kl", "ce"),
}
_LEAST: dict[str, float] = {
    "rho": 0,
    "every_n_steps": 1,
    "batch_size": 1,
    "noise_floor": 0,
    "max_skipped": 0,
    "halvings": 0,
    "chunk_tokens": 1,
    "tolerance": 0,
    "budget": 0,
    "max_length": 1,
}
_MAY_BE_NONE = ("budget", "max_length")


@dataclass(frozen=True, kw_only=True)
class Options:
    """All of them but the alignment set, the reference and the tokenizer.

    Raises:
        ConfigError: one is out of range.
    """

    rho: float
    every_n_steps: int
    batch_size: int
    projection: Literal["global", "none"]
    metric: Literal["euclidean", "adam"]
    mode: Literal["project", "trust_region", "watchdog"]
    objective: Objective
    cache_reference: bool
    max_length: int | None
    noise_floor: float
    max_skipped: int
    margin: float
    max_step: float | None
    tolerance: float
    budget: float | None
    halvings: int
    chunk_tokens: int
    log_layers: bool
    seed: int

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"SafeGrad({name}={value!r}): there are {', '.join(repr(a) for a in allowed)}")
        for name, minimum in _LEAST.items():
            value = getattr(self, name)
            if not (value is None and name in _MAY_BE_NONE) and not minimum <= value < math.inf:
                raise ConfigError(f"SafeGrad({name}={value!r}): give a number of {minimum} or more")
        if self.max_step is not None and not 0 < self.max_step < math.inf:
            raise ConfigError(
                f"SafeGrad(max_step={self.max_step!r}): give a number above 0, or None for the learning rate"
            )
        if not math.isfinite(self.margin):
            raise ConfigError(f"SafeGrad(margin={self.margin!r}): give a number")
