"""The three things that SafeGrad can do around an update: project its gradient, pull back after it, or check it.

u task gradient   a safety gradient
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from ballast.pipeline.training.safegrad import projection
from ballast.pipeline.training.safegrad.alignment_set import batch_number
from ballast.pipeline.training.safegrad.options import Options
from ballast.pipeline.training.safegrad.safety_gradient import Ranks, SafetyGradient, mean_loss, safety_gradient
from ballast.pipeline.training.safegrad.safety_loss import SafetyLoss


@dataclass(frozen=True)
class Update:
    """One optimizer step, as a mode sees it.

    Attributes:
        step: optimizer steps that were made before it.
        model: the policy, without DDP's wrapper.
        parameters: its trainable parameters.
        optimizer: with `param_groups` and `state`.
        max_norm: norm to which the trainer clips; 0 for none.
        ranks: this process.
    """

    step: int
    model: Any
    parameters: Sequence[torch.nn.Parameter]
    optimizer: Any
    max_norm: float
    ranks: Ranks


class Mode(Protocol):
    """What happens before the optimizer's step, on the accumulated gradient, and after it; each returns figures to log.

    `failed` is True where the safety loss gave no number, and the update was skipped or undone for it.
    """

    failed: bool

    def before(self, update: Update) -> dict[str, float]:
        """Called when `.grad` holds the clipped, averaged task gradient."""
        ...

    def after(self, update: Update) -> dict[str, float]:
        """Called when the weights have changed, and `.grad` is still there."""
        ...


class Project:
    """Takes the part against safety out of the task gradient, and adds the safety gradient (arXiv 2508.07172)."""

    def __init__(self, loss: SafetyLoss, options: Options) -> None:
        self.loss = loss
        self.options = options
        self.failed = False
        self._kept: SafetyGradient | None = None

    def state(self) -> dict[str, Any]:
        """The gradient that is kept between two."""
        return {} if self._kept is None else asdict(self._kept)

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with a kept gradient."""
        parts = [None if part is None else part.to(device) for part in state.get("parts", ())]
        self._kept = SafetyGradient(**{**state, "parts": parts}) if state else None

    def before(self, update: Update) -> dict[str, float]:
        """Project and add."""
        figures: dict[str, float] = {}
        self.failed = False
        if self._kept is None or update.step % self.options.every_n_steps == 0:
            numbers = _batches(self.loss, update, self.options)
            self._kept = safety_gradient(self.loss, update.model, update.parameters, numbers, update.ranks)
            figures[f"alignment_{self.loss.objective}"] = self._kept.loss
        task = [parameter.grad for parameter in update.parameters]
        safety = self._kept.parts
        divisors = None
        if self.options.metric == "adam":
            used = [u is not None for u in task]
            divisors = projection.adam_divisors(update.optimizer, update.parameters, used)
        found = projection.products(task, safety, divisors)
        task_finite, safety_finite = found.finite
        if not safety_finite or not math.isfinite(self._kept.loss):
            # Without a gradient no optimizer changes a parameter, by weight decay or otherwise.
            for parameter in update.parameters:
                parameter.grad = None
            self.failed, self._kept = True, None
            return {}
        if not task_finite:
            return figures  # the task's own failure, and its scaler's to answer
        step = projection.step_of(
            found, self.options.rho, self.options.projection == "global", self.options.noise_floor, update.max_norm
        )
        if step.applied:
            projection.apply(step, update.parameters, safety)
            figures |= {
                "cosine": step.cosine,
                "conflict_rate": float(step.conflict),
                "removed_norm_share": step.removed,
            }
            if self.options.log_layers:
                figures |= _cosine_by_layer(update, found)
        else:
            self._kept = None  # rounding noise, as where policy and reference are one: the next step asks again
        return figures | {"applied_rate": float(step.applied)}

    def after(self, update: Update) -> dict[str, float]:
        """Nothing: the gradient was all."""
        return {}


class TrustRegion:
    """Steps back along the safety gradient where an update has left the region in which safety is as it was (SPARD).

        theta <- theta - min((l - tau) / <a, a>, lr) * a   where l > tau

    l is the safety loss of a batch after the update, and tau the start model's on the same batch plus a margin. An update
    after which l or a is no number is undone.
    """

    def __init__(self, loss: SafetyLoss, start: Sequence[float], options: Options) -> None:
        self.loss = loss
        self.start = start  # of each batch, the start model's loss summed over its tokens
        self.options = options
        self.failed = False
        self._weights: list[torch.Tensor] | None = None

    def before(self, update: Update) -> dict[str, float]:
        """Keep the weights."""
        self._weights = None if update.step % self.options.every_n_steps else _copied(update)
        return {}

    def after(self, update: Update) -> dict[str, float]:
        """Step back."""
        self.failed = False
        weights, self._weights = self._weights, None
        if weights is None:
            return {}
        numbers = _batches(self.loss, update, self.options)
        found = safety_gradient(self.loss, update.model, update.parameters, numbers, update.ranks)
        tokens = sum(len(self.loss.batches[number].labels) for number in numbers)
        excess = found.loss - sum(self.start[number] for number in numbers) / tokens - self.options.margin
        figures = {"trust_loss": found.loss, "trust_excess": excess, "trust_rate": float(excess > 0)}
        if excess <= 0:
            return figures
        norm2 = math.fsum(projection.products(found.parts, found.parts).safety)
        if not math.isfinite(norm2) or not math.isfinite(excess):
            _put_back(update, weights)
            self.failed = True
            return {}
        if norm2 > 0:
            longest = self.options.max_step
            rates = {id(p): float(group["lr"]) for group in update.optimizer.param_groups for p in group["params"]}
            with torch.no_grad():
                for parameter, part in zip(update.parameters, found.parts, strict=True):
                    if part is not None:
                        limit = rates.get(id(parameter), 0.0) if longest is None else longest
                        parameter.sub_(part.to(parameter.dtype), alpha=min(excess / norm2, limit))
        return figures


class Watchdog:
    """Checks each update against a small safety benchmark before it stands.

    The safety loss over all batches may rise by `tolerance` in one update, and by `budget` since the start. An update
    above that is halved up to `halvings` times, and undone where that is not enough. The optimizer's moments stay.
    """

    def __init__(self, loss: SafetyLoss, start: Sequence[float], options: Options) -> None:
        self.loss = loss
        self.numbers = list(range(len(loss.batches)))
        self.start = sum(start) / sum(len(batch.labels) for batch in loss.batches)
        self.options = options
        self.failed = False
        self._before = 0.0
        self._weights: list[torch.Tensor] | None = None

    def before(self, update: Update) -> dict[str, float]:
        """Keep the weights, and their loss."""
        self._weights = None
        if update.step % self.options.every_n_steps:
            return {}
        # Not the loss after the last update: other callbacks (an average, a rollback) may have changed the weights since.
        self._before = self._measured(update)
        self._weights = _copied(update)
        return {}

    def after(self, update: Update) -> dict[str, float]:
        """Measure, and shorten or undo."""
        if self._weights is None:
            return {}
        limit = self._before + self.options.tolerance
        if self.options.budget is not None:
            limit = min(limit, max(self._before, self.start + self.options.budget))
        share, found = 1.0, self._measured(update)
        first = found
        for _ in range(self.options.halvings):
            if found <= limit:
                break
            share /= 2
            self._halve(update, self._weights)
            found = self._measured(update)
        if not found <= limit:  # a NaN too
            share, found = 0.0, self._before
            _put_back(update, self._weights)
        self._weights = None
        self.failed = not (math.isfinite(first) and math.isfinite(self._before))
        return {
            "watchdog_loss": found,
            "watchdog_rise": found - self._before,
            "watchdog_kept_share": share,
            "watchdog_shortened_rate": float(0 < share < 1),
            "watchdog_undone_rate": float(share == 0),
        }

    def _measured(self, update: Update) -> float:
        return mean_loss(self.loss, update.model, self.numbers, update.ranks)

    def _halve(self, update: Update, weights: Sequence[torch.Tensor]) -> None:
        """Leave half of the way from the kept weights to the present ones."""
        with torch.no_grad():
            for parameter, kept in zip(update.parameters, weights, strict=True):
                parameter.lerp_(kept, 0.5)


def made_mode(loss: SafetyLoss, start: Sequence[float], options: Options) -> Mode:
    """The mode that the options name; `start` is the start model's loss of each batch, which projecting does not read."""
    if options.mode == "project":
        return Project(loss, options)
    return (TrustRegion if options.mode == "trust_region" else Watchdog)(loss, start, options)


def _copied(update: Update) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in update.parameters]


def _put_back(update: Update, weights: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, kept in zip(update.parameters, weights, strict=True):
            parameter.copy_(kept)


def _batches(loss: SafetyLoss, update: Update, options: Options) -> list[int]:
    """The batch of each process at this step."""
    visit = update.step // options.every_n_steps * update.ranks.world
    return [batch_number(visit + rank, len(loss.batches), options.seed) for rank in range(update.ranks.world)]


def _cosine_by_layer(update: Update, found: projection.Products) -> dict[str, float]:
    """Cosine of task and safety gradient in each numbered layer."""
    sums: dict[str, list[float]] = {}
    names = {id(parameter): name for name, parameter in update.model.named_parameters()}
    for parameter, *row in zip(update.parameters, found.task, found.cross, found.safety, strict=True):
        number = next((part for part in names[id(parameter)].split(".") if part.isdigit()), None)
        if number is not None:
            total = sums.setdefault(number, [0.0, 0.0, 0.0])
            sums[number] = [t + value for t, value in zip(total, row, strict=True)]
    return {
        f"cosine_layer_{number}": cross / math.sqrt(task * safety)
        for number, (task, cross, safety) in sums.items()
        if task > 0 and safety > 0
    }
