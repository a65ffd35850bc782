"""The parts of safety-aware probing: vectors on hidden states, a step of the weights that is taken back, their sizes.

H hidden size
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ballast.pipeline.training.layers import check_layers, decoder_layers, hidden_of, with_hidden


class Probe:
    """One vector (H,) a layer, added to the layer's hidden states at every token; without vectors it does nothing.

    It lives in hooks and not in the model: nothing of it is in `state_dict`. Forwards without gradients are not probed: a
    reference that is the same model with its adapter off runs so.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self.layers = check_layers(model, layers)
        self.vectors: dict[int, torch.Tensor] = {}
        found = decoder_layers(model)
        self._hooks = [found[n].register_forward_hook(self._adding(n)) for n in self.layers]
        weight = next(p for p in found[self.layers[0]].parameters())
        self._zero = torch.zeros(model.config.get_text_config().hidden_size, device=weight.device)
        if weight.dtype == torch.float64:
            self._zero = self._zero.double()

    def zeros(self) -> dict[int, torch.Tensor]:
        """Vectors of 0 that take a gradient."""
        return {n: self._zero.clone().requires_grad_() for n in self.layers}

    def remove(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()

    def _adding(self, layer: int) -> Any:
        def add(module: Any, args: Any, output: Any) -> Any:
            vector = self.vectors.get(layer)
            if vector is None or not torch.is_grad_enabled():
                return None
            hidden = hidden_of(output)
            return with_hidden(output, hidden + vector.to(hidden.device, hidden.dtype))

        return add


@contextmanager
def stepped(parameters: Sequence[torch.Tensor], direction: Sequence[torch.Tensor], share: float) -> Iterator[None]:
    """The parameters moved by `share * |parameters| * direction / |direction|`; afterwards as before, bit for bit.

    Norms are over all tensors together. Nothing of a graph that was made inside may be run backward afterwards.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    length = share * norm(before) / norm(direction)
    try:
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.add_(along.to(parameter.dtype), alpha=length)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def norm(tensors: Sequence[torch.Tensor]) -> float:
    """Euclidean norm of all entries together; sums in fp64, a tensor at a time."""
    return math.sqrt(sum(float(tensor.detach().double().pow(2).sum()) for tensor in tensors))


def cosine(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Cosine of two lists of tensors of the same shapes, each list taken as one vector; NaN where one is 0."""
    product = sum(float((a.detach().double() * b.detach().double()).sum()) for a, b in zip(one, other, strict=True))
    length = norm(one) * norm(other)
    return product / length if length > 0 else math.nan


def probe_vectors(
    harmful: dict[int, torch.Tensor], plain: dict[int, torch.Tensor], beta: float, scale: str, micro_batches: int = 1
) -> dict[int, torch.Tensor]:
    """The vectors from the two gradients: the direction in which the harmful step helps the task ever less.

    Args:
        harmful: layer to gradient (H,) of the task loss after the harmful step.
        plain: the same before it.
        beta: as `scale` says.
        scale: `gradient`: V = beta * micro_batches * (harmful - plain); `rms`: the same direction with root mean square
            beta over all layers' entries.
        micro_batches: of a step, where the gradients are those of one of them and the loss is divided by their number.

    Returns:
        Layer to vector (H,), without gradient; 0 where the gradients are equal.
    """
    difference = {n: (harmful[n] - plain[n]).detach() for n in harmful}
    if scale == "gradient":
        return {n: beta * micro_batches * vector for n, vector in difference.items()}
    length = norm(list(difference.values()))
    entries = sum(vector.numel() for vector in difference.values())
    factor = beta * math.sqrt(entries) / length if length > 0 and math.isfinite(length) else 0.0
    return {n: factor * vector for n, vector in difference.items()}
