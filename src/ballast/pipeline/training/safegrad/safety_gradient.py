"""The gradient of the safety loss, which leaves the task's `.grad` as it is, on one process or many.

P trainable parameters
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ballast.errors import BallastError
from ballast.pipeline.training.safegrad.safety_loss import SafetyLoss, without_gradient

_BUCKET = 2**24  # elements that travel between processes at a time


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    world: int = 1
    rank: int = 0

    def summed(self, values: Sequence[float], device: Any) -> list[float]:
        """Each value summed over the processes."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float32, device=device)
        torch.distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found


@dataclass(frozen=True)
class SafetyGradient:
    """The gradient of the mean safety loss per completion token.

    Attributes:
        parts: one a trainable parameter, None where the loss does not depend on it; sharded as the parameters are, and
            otherwise equal on all processes.
        loss: that mean, in nats, over all processes' batches.
        batches: number of the batch of each process.
    """

    parts: list[torch.Tensor | None]
    loss: float
    batches: tuple[int, ...]


def safety_gradient(
    loss: SafetyLoss, model: Any, parameters: Sequence[torch.nn.Parameter], numbers: Sequence[int], ranks: Ranks
) -> SafetyGradient:
    """The gradient over one batch of each process.

    Args:
        loss: the safety loss.
        model: the policy, without DDP's wrapper.
        parameters: its trainable parameters.
        numbers: batch of each process.
        ranks: this process.

    Raises:
        BallastError: no parameter has a gradient.
    """
    number = numbers[ranks.rank]
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    # The sum over tokens is differentiated and divided afterwards: a mean's small numbers would be lost in fp16.
    compute = _by_backward if sharded else _by_autograd
    parts, summed = compute(lambda: loss.summed(model, number), parameters)
    if all(part is None for part in parts):
        raise BallastError(
            "the safety loss reaches none of the trainable parameters, so SafeGrad would protect nothing; check that the trained "
            "layers take part in the model's forward"
        )
    total, tokens = ranks.summed([summed, len(loss.batches[number].labels)], parameters[0].device)
    if ranks.world > 1 and not sharded:
        sum_over_processes(parts)
    # A sharded backward takes the mean over processes, a reduction above the sum.
    divisor = tokens / ranks.world if sharded else tokens
    for part in parts:
        if part is not None:
            part.div_(divisor)
    return SafetyGradient(parts, total / tokens, tuple(numbers))


def mean_loss(loss: SafetyLoss, model: Any, numbers: Sequence[int], ranks: Ranks) -> float:
    """The mean safety loss per completion token over some batches, shared out among the processes; no gradient.

    NaN where a batch gives no number.
    """
    device = next(model.parameters()).device
    # Under sharding every process takes part in every forward, so all make the same number of them.
    turns = math.ceil(len(numbers) / ranks.world)
    summed = tokens = 0.0
    with without_gradient(model):
        for turn in range(turns):
            place = turn * ranks.world + ranks.rank
            value = loss.summed(model, numbers[place % len(numbers)])
            if place < len(numbers):
                summed += float(value)
                tokens += len(loss.batches[numbers[place]].labels)
    summed, tokens = ranks.summed([summed, tokens], device)
    return summed / tokens


def _by_autograd(
    loss: Callable[[], torch.Tensor], parameters: Sequence[torch.nn.Parameter]
) -> tuple[list[torch.Tensor | None], float]:
    """Reads gradients off the graph: `.grad` and DDP's hooks on it take no part."""
    value = loss()
    parts = torch.autograd.grad(value, list(parameters), allow_unused=True)
    # A gradient may be an expanded view of few numbers, which cannot be divided in place.
    return [None if part is None else part.contiguous() for part in parts], value.item()


def _by_backward(
    loss: Callable[[], torch.Tensor], parameters: Sequence[torch.nn.Parameter]
) -> tuple[list[torch.Tensor | None], float]:
    """FSDP2 reduces gradients in hooks that run in a backward alone: the task's are put aside meanwhile."""
    aside = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        value = loss()
        value.backward()
        return [parameter.grad for parameter in parameters], value.item()
    finally:
        for parameter, gradient in zip(parameters, aside, strict=True):
            parameter.grad = gradient


def sum_over_processes(parts: Sequence[torch.Tensor | None]) -> None:
    """Sum over processes, in place, a bucket of tensors at a time."""
    bucket: list[torch.Tensor] = []
    given = [part for part in parts if part is not None]
    for position, part in enumerate(given):
        bucket.append(part)
        last = position == len(given) - 1
        if last or sum(t.numel() for t in bucket) >= _BUCKET or given[position + 1].dtype != part.dtype:
            flat = torch.cat([t.reshape(-1) for t in bucket])
            torch.distributed.all_reduce(flat)
            for t, piece in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(piece.view_as(t))
            bucket = []
