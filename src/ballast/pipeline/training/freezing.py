"""Freezing of safety layers (SPPFT, arXiv 2408.17003): the layers that tell harmful from harmless do not learn.

Frozen means `requires_grad = False`: such a parameter gets no gradient and no place in the optimizer, so that weight decay
leaves it alone too. A gradient set to zero would not do: AdamW decays the weight all the same.
"""

import copy
import re
from collections.abc import Collection
from typing import Any

from ballast.errors import ConfigError
from ballast.pipeline.training.layers import check_layers, decoder_layers, layers_path


def freeze_layers(model: Any, layers: Collection[int]) -> int:
    """Freeze decoder layers, before or after a trainer is made for the model.

    In a PEFT model the adapters of these layers are frozen as they are: a new one stays without effect. To have none
    there at all, make the adapter with `adapter_outside`.

    Args:
        model: a transformers causal model, or a PEFT model around one.
        layers: numbers from 0, for example `range(6, 13)`.

    Returns:
        How many numbers (elements of parameters) were frozen that would have learnt.

    Raises:
        ConfigError: no layer, one that the model does not have, or nothing would be left to learn.
        ModelError: the layers cannot be found.
    """
    chosen = check_layers(model, layers)
    found = decoder_layers(model)
    inside = {id(p): p for n in chosen for p in found[n].parameters() if p.requires_grad}
    shared = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in inside]
    if len(shared) != len(inside):
        raise ConfigError(
            f"layers {_shown(chosen)} share weights with other parts of the model, which would be frozen too; freeze all "
            "layers that share them, or none"
        )
    if not any(p.requires_grad and id(p) not in inside for p in model.parameters()):
        raise ConfigError(f"with layers {_shown(chosen)} frozen nothing is left to learn; freeze fewer")
    for parameter in inside.values():
        parameter.requires_grad_(False)
        parameter.grad = None  # one left from before would still be applied
    return sum(parameter.numel() for parameter in inside.values())


def adapter_outside(peft_config: Any, model: Any, layers: Collection[int]) -> Any:
    """The adapter's configuration with no adapter on these layers.

    By `exclude_modules` rather than `layers_to_transform`, which PEFT refuses beside `target_modules="all-linear"`.

    Args:
        peft_config: a PEFT configuration with `exclude_modules`; it is not changed.
        model: the model that gets the adapter.
        layers: numbers from 0.

    Raises:
        ConfigError: no layer, one that the model does not have, or all of them.
        ModelError: the layers cannot be found.
    """
    chosen = check_layers(model, layers)
    if len(chosen) == len(decoder_layers(model)):
        raise ConfigError(f"with layers {_shown(chosen)} frozen no layer is left for an adapter; freeze fewer")
    own = rf"(?:.*\.)?{re.escape(layers_path(model))}\.(?:{'|'.join(map(str, chosen))})\..*"
    before = peft_config.exclude_modules
    if before:
        names = [before] if isinstance(before, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(before)]
        own = "|".join(f"(?:{pattern})" for pattern in [*names, own])
    outside = copy.deepcopy(peft_config)
    outside.exclude_modules = own
    return outside


def _shown(layers: Collection[int]) -> str:
    return ", ".join(map(str, layers))
