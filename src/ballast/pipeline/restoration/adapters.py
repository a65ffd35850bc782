"""A LoRA in place of a full model: PEFT's folder, read over the model that it was trained on.

Its difference from that model is kept as two thin factors, `scaling * B` and `A`, where a method can use them; where
it cannot, they are merged tensor by tensor, in fp32. (Format and scaling read in PEFT 0.21.)
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ballast.errors import ModelError
from ballast.pipeline.restoration.weights import Factors, Weights, check_finite, own_fp32

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"^(?P<module>.*)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a full model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


class Adapter:
    """A LoRA over a model. It is `Weights`; see there.

    Tensors that it stores whole (`modules_to_save`, biases) replace those of the base and have no factors.

    Args:
        folder: as PEFT saves it.
        label: what the model is here, for messages.
        base: the model that it was trained on.

    Raises:
        ModelError: it cannot be read, is no plain LoRA of linear layers, or does not fit the base.
    """

    def __init__(self, folder: Path, label: str, base: Weights) -> None:
        self.folder, self.label, self.base = folder, label, base
        self.config, self.names = base.config, base.names
        self.settings = adapter_config(folder, label)
        self._refuse_variants()
        try:
            self._handle = safe_open(folder / WEIGHTS, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{label} '{folder}': {WEIGHTS} cannot be read ({error}); save the adapter with save_pretrained, or copy it again"
            ) from error
        self._pairs: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        for key in self._handle.keys():  # noqa: SIM118 - it is no mapping
            self._sort_in(key)
        for name in self._pairs:
            self._check_pair(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """See `Weights`."""
        return self.base.dtype(name)

    def tensor(self, name: str) -> torch.Tensor:
        """See `Weights`."""
        if name in self._whole:
            return self._read(self._whole[name], name)
        factors = self.factors(name)
        if factors is None:
            return self.base.tensor(name)
        return own_fp32(self.base.tensor(name)).addmm_(factors.left, factors.right)

    def factors(self, name: str) -> Factors | None:
        """See `Weights`."""
        if name not in self._pairs:
            return None
        a, b = (self._read(self._pairs[name][side], name).float() for side in "AB")
        b = b * self._scaling(name, a.shape[0])
        return Factors(a.T, b.T) if self.settings.get("fan_in_fan_out") else Factors(b, a)

    def differs(self, name: str) -> bool:
        """See `Weights`."""
        return name in self._pairs or name in self._whole

    def files(self) -> list[Path]:
        """See `Weights`."""
        return [self.folder / WEIGHTS]

    def _read(self, key: str, name: str) -> torch.Tensor:
        return check_finite(self._handle.get_tensor(key), name, self)

    def _scaling(self, name: str, rank: int) -> float:
        alpha = self.settings.get("lora_alpha", 8)
        if pattern := self.settings.get("alpha_pattern"):
            from peft.utils.other import get_pattern_key

            module = name.removesuffix(".weight")
            alpha = pattern.get(get_pattern_key(list(pattern), module), alpha)
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _refuse_variants(self) -> None:
        kind = self.settings.get("peft_type")
        variants = [
            key for key in ("use_dora", "use_qalora", "use_bdlora", "arrow_config", "megatron_config", "trainable_token_indices",
                            "alora_invocation_tokens", "target_parameters", "layer_replication", "lora_bias") if self.settings.get(key)
        ]  # fmt: skip
        if kind != "LORA" or variants:
            raise ModelError(
                f"{self.label} '{self.folder}' is {variants[0] if kind == 'LORA' else kind}, and only a plain LoRA is a sum with its "
                "base; merge it with PEFT's merge_and_unload(), save the model, and give that folder"
            )

    def _sort_in(self, key: str) -> None:
        inner = key.removeprefix(_PREFIX)
        match = _LORA.match(inner)
        name = f"{match['module']}.weight" if match else inner
        if name not in self.base.names or (match is None and "lora_" in inner):
            raise ModelError(
                f"tensor '{key}' of {self.label} '{self.folder}' has no place in {self.base.label} '{self.base.folder}'; the adapter "
                "belongs to another model, or is no LoRA of linear layers: give its own base, or merge it with PEFT first"
            )
        if match:
            self._pairs.setdefault(name, {})[match["side"]] = key
        else:
            shape = tuple(self._handle.get_slice(key).get_shape())
            self._check_fit(name, shape)
            self._whole[name] = key

    def _check_pair(self, name: str) -> None:
        keys = self._pairs[name]
        if set(keys) != {"A", "B"}:
            raise ModelError(
                f"{self.label} '{self.folder}' holds only lora_{next(iter(keys))} for '{name}'; the file is incomplete: copy it again"
            )
        a, b = (self._handle.get_slice(keys[side]).get_shape() for side in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ModelError(
                f"{self.label} '{self.folder}': A {tuple(a)} and B {tuple(b)} for '{name}' have no product; only LoRAs of linear layers "
                "are read: merge it with PEFT first"
            )
        self._check_fit(name, (a[1], b[0]) if self.settings.get("fan_in_fan_out") else (b[0], a[1]))

    def _check_fit(self, name: str, shape: tuple[int, ...]) -> None:
        if shape != self.base.shape(name):
            raise ModelError(
                f"tensor '{name}' has shape {self.base.shape(name)} in {self.base.label} '{self.base.folder}' and {shape} by "
                f"{self.label} '{self.folder}'; the adapter belongs to another model: give its own base"
            )


def adapter_config(folder: Path, label: str) -> dict[str, Any]:
    """What PEFT wrote about an adapter.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        settings: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{label} '{folder}': {CONFIG} cannot be read ({type(error).__name__}: {error}); save the adapter with save_pretrained"
        ) from error
    return settings
