"""Plain means against drift, as callbacks of any Trainer: L2 to the start point, and an average of the weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ballast.errors import ConfigError


class L2ToStart(TrainerCallback):
    """Adds the gradient of `weight / 2 * |W - W_start|^2` once an optimizer step, after the clipping of the task's.

    Of a LoRA, W - W_start is what the merged weights change by, `s * (B A - B_start A_start)`: A and B may turn without
    moving the model, and do not count for themselves. It costs (r, r) products alone. Whatever else is trained counts
    as it is, and takes its memory once more. Logs `regularization/distance`, |W - W_start| before the step.

    Args:
        weight: above 0.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._parts: list[_Whole | _Product] = []
        self._distance = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Note where the weights begin."""
        self._parts = list(_parts(model))

    def checkpoint_state(self) -> dict[str, Any]:
        """Where the weights began."""
        return {"starts": [start for part in self._parts for start in part.starts]}

    def restore_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Pull to that start, not to the weights that a resumed training begins with."""
        _copy(state["starts"], [start for part in self._parts for start in part.starts])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pull towards the start."""
        squared = sum(part.pull(self.weight) for part in self._parts)
        self._distance = max(0.0, float(squared)) ** 0.5

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The distance, for the callbacks after this one."""
        if logs is not None and "loss" in logs:
            logs["regularization/distance"] = self._distance


@dataclass
class _Whole:
    """A parameter that stands for itself."""

    parameter: torch.Tensor
    start: torch.Tensor

    @property
    def starts(self) -> tuple[torch.Tensor, ...]:
        """What it is compared with."""
        return (self.start,)

    def pull(self, weight: float) -> float:
        """Add weight * (w - w_start) to the gradient; gives |w - w_start|^2."""
        change = self.parameter.detach() - self.start
        _add(self.parameter, weight * change)
        return float(change.double().pow(2).sum())


@dataclass
class _Product:
    """The two factors of a LoRA on one matrix."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scale: float
    a_start: torch.Tensor
    b_start: torch.Tensor

    @property
    def starts(self) -> tuple[torch.Tensor, ...]:
        """What it is compared with."""
        return (self.a_start, self.b_start)

    def pull(self, weight: float) -> float:
        """Add the gradients in A and B; gives s^2 |B A - B_start A_start|^2, without making the (out, in) matrix."""
        a, b, a0, b0 = (t.detach().float() for t in (self.a, self.b, self.a_start, self.b_start))
        factor = weight * self.scale**2
        aa, a0a = a @ a.T, a0 @ a.T
        bb, bb0 = b.T @ b, b.T @ b0
        _add(self.b, factor * (b @ aa - b0 @ a0a))
        _add(self.a, factor * (bb @ a - bb0 @ a0))
        squared = (bb * aa).sum() - 2 * (bb0 * a0a.T).sum() + ((b0.T @ b0) * (a0 @ a0.T)).sum()
        return float(squared) * self.scale**2


def _add(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient.to(parameter.grad.dtype))


def _parts(model: Any) -> Iterator[_Whole | _Product]:
    """What is trained, in the parts that a distance is made of.

    Raises:
        ConfigError: an adapter whose change of the weights is no B A.
    """
    paired: set[int] = set()
    for name, module in model.named_modules():
        for adapter, a_layer in getattr(module, "lora_A", {}).items():
            a, b = a_layer.weight, module.lora_B[adapter].weight
            if not (a.requires_grad or b.requires_grad):
                continue
            if a.dim() != 2 or getattr(module, "use_dora", {}).get(adapter, False):
                raise ConfigError(
                    f"regularization.l2_weight does not know how the adapter on '{name}' changes its weights (DoRA, or no linear layer); "
                    "take plain LoRA on linear layers"
                )
            paired |= {id(a), id(b)}
            yield _Product(a, b, float(module.scaling[adapter]), a.detach().clone(), b.detach().clone())
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in paired:
            yield _Whole(parameter, parameter.detach().clone())


class WeightAverage(TrainerCallback):
    """An exponential average of the trained weights, evaluated, saved and left in the model at the end.

    average <- decay * average + (1 - decay) * weights after every optimizer step, from the start weights on, in fp32. Training
    goes on with the weights themselves. What the Trainer saves by its own `save_strategy` is the average, and from there a
    training goes on with the average for its weights. A checkpoint of `CheckpointCallback` holds both, and a training that
    goes on from one ends as if it had never stopped. With TRL's GRPO do not evaluate between steps: vLLM would keep the
    average for the rollouts of the next step.

    Args:
        decay: in (0, 1); it looks back about 1 / (1 - decay) steps.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._trained: Sequence[torch.Tensor] = ()
        self._average: list[torch.Tensor] = []
        self._live: list[torch.Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """The average begins at the start weights."""
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._average = [p.detach().float().clone() for p in self._trained]
        self._live = None

    def checkpoint_state(self) -> dict[str, Any]:
        """The average, and the weights themselves where the model shows the average at the moment."""
        return {"average": self._average, "live": self._live}

    def restore_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Go on from both."""
        _copy(state["average"], self._average)
        self._live = state["live"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on with the weights themselves."""
        if self._live is not None:
            _copy(self._live, self._trained)
            self._live = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the step into the average; show the average to an evaluation or a checkpoint that comes now."""
        for average, parameter in zip(self._average, self._trained, strict=True):
            average.lerp_(parameter.detach().float(), 1 - self.decay)
        self._show(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the average to what comes at the end of an epoch."""
        self._show(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the average in the model, unless the best checkpoint was loaded: that one is an average already."""
        if not args.load_best_model_at_end:
            _copy(self._average, self._trained)
        self._live = None

    def _show(self, control: TrainerControl) -> None:
        if self._live is None and (control.should_evaluate or control.should_save):
            self._live = [p.detach().clone() for p in self._trained]
            _copy(self._average, self._trained)


def _copy(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for value, parameter in zip(source, target, strict=True):
            parameter.copy_(value)
