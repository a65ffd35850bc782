"""SafeGrad's arithmetic (arXiv 2508.07172, section 3) on gradients that are lists of tensors, one a trainable parameter.

    u task gradient   a safety gradient   D what an Adam optimizer divides a gradient by

With d = <u, a> over all trainable parameters together:

    u <- u - d / <a, a> * a   where d < 0
    g  = u + rho * a

`metric="adam"` asks the same of what the optimizer makes of it: c = <u, D^-1 a> / <a, D^-1 a> in place of d / <a, a>, so
that the preconditioned update D^-1 u, and not u, loses its part against a.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from ballast.errors import ConfigError

_ELEMENTS = 2**26  # elements of a tensor that are copied to fp32 at a time

Gradient = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Products:
    """Inner products of each parameter's part of the two gradients, over all of its shards.

    Attributes:
        task: <u, u>.
        cross: <u, a>.
        safety: <a, a>.
        metric_cross: <u, D^-1 a>; `cross` in the Euclidean metric.
        metric_safety: <a, D^-1 a>; `safety` in the Euclidean metric.
    """

    task: list[float]
    cross: list[float]
    safety: list[float]
    metric_cross: list[float]
    metric_safety: list[float]

    @property
    def finite(self) -> tuple[bool, bool]:
        """Whether the task gradient, and the safety gradient, hold only numbers."""
        return math.isfinite(math.fsum(self.task)), math.isfinite(math.fsum(self.safety))


@dataclass(frozen=True)
class Step:
    """What becomes of the task gradient: `scale * (u + weight * a)`, and figures about it.

    Attributes:
        scale: of the second clipping.
        weight: rho, and what the projection takes out.
        cosine: of u and a; 0 where one of them is 0.
        conflict: whether d < 0.
        removed: norm of what the projection took out, as a share of the norm of u.
        applied: False where a is too small to be told from rounding, and u stays as it is.
    """

    scale: float
    weight: float
    cosine: float
    conflict: bool
    removed: float
    applied: bool


def products(task: Gradient, safety: Gradient, divisors: Gradient | None = None) -> Products:
    """All inner products that a step needs, with one wait for the device.

    Args:
        task: u; None is 0.
        safety: a; None is 0.
        divisors: D; None takes the Euclidean metric.
    """
    by_metric = safety
    if divisors is not None:
        by_metric = [None if a is None or d is None else a.float() / d for a, d in zip(safety, divisors, strict=True)]
    pairs = [(task, task), (task, safety), (safety, safety)]
    if divisors is not None:
        pairs += [(task, by_metric), (safety, by_metric)]
    flat = [pair for left, right in pairs for pair in zip(left, right, strict=True)]
    values, n = _dots(flat), len(task)
    found = [values[start : start + n] for start in range(0, len(values), n)]
    return Products(*found, *([] if divisors is not None else found[1:3]))


def step_of(found: Products, rho: float, project: bool, noise_floor: float, max_norm: float) -> Step:
    """The step that the products give.

    Args:
        found: the products.
        rho: weight of the safety gradient.
        project: whether the part of u against a is taken out.
        noise_floor: least <a, a> / <u, u>; below it a is rounding.
        max_norm: norm to which g is clipped, as before it u was; 0 clips nothing.
    """
    uu, ua, aa = math.fsum(found.task), math.fsum(found.cross), math.fsum(found.safety)
    metric_ua, metric_aa = math.fsum(found.metric_cross), math.fsum(found.metric_safety)
    cosine = ua / math.sqrt(uu * aa) if uu > 0 and aa > 0 else 0.0
    if aa == 0 or aa < noise_floor * uu:
        return Step(1.0, 0.0, cosine, conflict=False, removed=0.0, applied=False)
    conflict = metric_ua < 0
    coefficient = metric_ua / metric_aa if conflict and project else 0.0
    weight = rho - coefficient
    norm = math.sqrt(max(0.0, uu + 2 * weight * ua + weight**2 * aa))
    # Where nothing is taken or added, u is clipped already, and stays as it is to the last bit.
    scale = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 and weight != 0 else 1.0
    removed = abs(coefficient) * math.sqrt(aa / uu) if uu > 0 else 0.0
    return Step(scale, weight, cosine, conflict, removed, applied=True)


def apply(step: Step, parameters: Sequence[torch.nn.Parameter], safety: Gradient) -> None:
    """Write the step's gradient into `.grad`."""
    if step.weight == 0:
        return
    for parameter, a in zip(parameters, safety, strict=True):
        if a is not None and parameter.grad is None:
            parameter.grad = (a * (step.scale * step.weight)).to(parameter.dtype)
        elif parameter.grad is not None:
            if step.scale != 1:
                parameter.grad.mul_(step.scale)
            if a is not None:
                parameter.grad.add_(a, alpha=step.scale * step.weight)


def adam_divisors(optimizer: Any, parameters: Sequence[torch.nn.Parameter], used: Sequence[bool]) -> Gradient | None:
    """What Adam divides each parameter's gradient by, from its running mean of squares as it is before this update.

    Args:
        optimizer: an optimizer with `exp_avg_sq`: Adam, AdamW and their relatives.
        parameters: the trainable parameters.
        used: whether a parameter has a gradient in this step.

    Returns:
        D in fp32; None before the optimizer's first update, when every D is still unknown.

    Raises:
        ConfigError: the optimizer keeps no such mean.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    divisors: list[torch.Tensor | None] = []
    for parameter, is_used in zip(parameters, used, strict=True):
        state = optimizer.state.get(parameter)
        if not state:
            if is_used:
                return None
            divisors.append(None)
            continue
        square = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if not torch.is_tensor(square) or square.shape != parameter.shape:
            raise ConfigError(
                f"metric='adam' reads exp_avg_sq of the optimizer's state, and {type(optimizer).__name__} keeps {', '.join(sorted(state))}; "
                "take optim='adamw_torch', or metric='euclidean'"
            )
        group, count = group_of[id(parameter)], state["step"]
        # A count on the device stays there: to read one for every parameter would wait for it as often.
        exact = not torch.is_tensor(count) or count.device.type == "cpu"
        correction = 1 - group["betas"][1] ** (float(count) if exact else count)
        divisors.append((square.float() / correction).sqrt_().add_(group["eps"]))
    return divisors


def _dots(pairs: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]]) -> list[float]:
    """<x, y> of each pair in fp32; over all shards where the tensors are sharded."""
    kinds: dict[Any, list[int]] = {}
    local: dict[int, torch.Tensor] = {}
    for number, (x, y) in enumerate(pairs):
        if x is None or y is None:
            continue
        kinds.setdefault((x.device_mesh, x.placements) if isinstance(x, DTensor) else None, []).append(number)
        local[number] = _dot(_shard(x), _shard(y))
    values = [0.0] * len(pairs)
    for kind, numbers in kinds.items():
        stacked = torch.stack([local[number].to(local[numbers[0]].device) for number in numbers])
        if kind is not None:
            mesh, placements = kind
            # A shard's dot is a part of the sum over the shard group alone: with replicas no group counts twice.
            parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
            stacked = DTensor.from_local(stacked, mesh, parts).full_tensor()
        # The host waits for the device here.
        for number, value in zip(numbers, stacked.tolist(), strict=True):
            values[number] = value
    return values


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x, y = x.detach().reshape(-1), y.detach().reshape(-1)
    if not x.numel():
        return torch.zeros((), device=x.device)
    parts = zip(x.split(_ELEMENTS), y.split(_ELEMENTS), strict=True)
    return torch.stack([torch.dot(a.float(), b.float()) for a, b in parts]).sum()
