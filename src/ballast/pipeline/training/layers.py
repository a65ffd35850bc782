"""The decoder layers of a transformers model, by number from 0, as PEFT's `layers_to_transform` counts them.

Every transformers causal model keeps them in one `ModuleList` (`model.layers`, `transformer.h`, ...); they are found by
their number in the configuration, inside a PEFT model as well as outside.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ballast.errors import ConfigError, ModelError
from ballast.pipeline.training.reference import base_model


def decoder_layers(model: Any) -> Any:
    """The `ModuleList` of decoder layers, first layer first.

    Raises:
        ModelError: the model has no such list, or several.
    """
    return _named_layers(model)[1]


def layers_path(model: Any) -> str:
    """Where the layers stand in the base model, for example `model.layers`."""
    return _named_layers(model)[0]


def check_layers(model: Any, layers: Collection[int]) -> tuple[int, ...]:
    """The numbers, sorted and without doubles.

    Raises:
        ConfigError: none, or one that the model does not have.
    """
    count = len(decoder_layers(model))
    wrong = sorted(layer for layer in layers if not 0 <= layer < count)
    if wrong or not layers:
        said = f"layer {wrong[0]} does not exist" if wrong else "no layer is named"
        raise ConfigError(
            f"{said}: {type(base_model(model)).__name__} has the layers 0 to {count - 1}; name some of them"
        )
    return tuple(sorted(set(layers)))


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states (B, T, H) in what a decoder layer returns."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """What a decoder layer returned, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def skipped(model: Any, layers: Collection[int]) -> Iterator[None]:
    """These layers hand on what they were given.

    They still run, so that a cache of keys keeps an entry for each of them and positions stay right.
    """

    def hand_on(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return with_hidden(output, args[0] if args else kwargs["hidden_states"])

    found = decoder_layers(model)
    hooks = [found[n].register_forward_hook(hand_on, with_kwargs=True) for n in check_layers(model, layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def scaled(model: Any, layers: Collection[int], alpha: float) -> Iterator[None]:
    """The matrices of these layers (attention and MLP) times `alpha`; afterwards they are as before, bit for bit."""
    found = decoder_layers(model)
    matrices = [p for n in check_layers(model, layers) for p in found[n].parameters() if p.dim() == 2]
    before = [matrix.detach().clone() for matrix in matrices]
    try:
        with torch.no_grad():
            for matrix in matrices:
                matrix.mul_(alpha)
        yield
    finally:
        with torch.no_grad():
            for matrix, value in zip(matrices, before, strict=True):
                matrix.copy_(value)


def _named_layers(model: Any) -> tuple[str, Any]:
    base = base_model(model)
    count = base.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    # Lists inside a layer (say, of experts) may be as long by chance; the layers' own list stands outside.
    outer = [(name, found) for name, found in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1:
        raise ModelError(
            f"{type(base).__name__} has {len(outer)} lists of {count} modules, so its decoder layers cannot be told; freezing, "
            "localisation and probing need a text model of transformers with one stack of layers"
        )
    return outer[0]
