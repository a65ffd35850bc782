"""Safetensors checkpoints, read tensor by tensor from mapped files: one costs memory only once it is computed with."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ballast.errors import ModelError
from ballast.pipeline.restoration.weights import Factors, Weights, check_finite

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
_QUANTISED = (".qweight", ".weight_packed", ".absmax", ".SCB")
_OUTPUTS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class TensorSpec:
    """What a shard's header says of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """A full checkpoint: one safetensors file, or several under an index. It is `Weights`.

    Args:
        folder: with config.json and the weights.
        label: what the model is here, for messages.

    Raises:
        ModelError: no config, no weights, a missing or damaged shard, quantised weights, a tied output layer that is
            not the embedding.
    """

    base: Weights | None = None

    def __init__(self, folder: Path, label: str) -> None:
        self.folder, self.label = folder, label
        self.config = read_config(folder, label)
        self._handles: dict[str, Any] = {}
        self._file_of = self._locate()
        self._spec_of: dict[str, TensorSpec] = {}
        for name in self._file_of:
            self._spec_of[name] = self._spec(name)
        self._drop_tied()
        self.names = tuple(self._spec_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights`."""
        return self._known(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """See `Weights`."""
        return self._known(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """See `Weights`."""
        self._known(name)
        return check_finite(self._read(name), name, self)

    def factors(self, name: str) -> Factors | None:
        """See `Weights`."""
        return None

    def differs(self, name: str) -> bool:
        """See `Weights`."""
        return True

    def files(self) -> list[Path]:
        """See `Weights`."""
        return [self.folder / file for file in sorted(set(self._file_of.values()))]

    def _known(self, name: str) -> TensorSpec:
        if name not in self._spec_of:
            raise ModelError(
                f"{self.label} '{self.folder}' has no tensor '{name}'; give models of one architecture, saved by save_pretrained"
            )
        return self._spec_of[name]

    def _locate(self) -> dict[str, str]:
        """File of each tensor, in the order of the files."""
        index = self.folder / INDEX
        if not (self.folder / SINGLE).is_file() and index.is_file():
            try:
                listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(listed.values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(
                    f"{self.label} '{self.folder}': {INDEX} is no index of shards ({type(error).__name__}: {error}); save or "
                    "download the model again"
                ) from error
            return self._of_index(listed, files)
        found = (
            [SINGLE] if (self.folder / SINGLE).is_file() else sorted(p.name for p in self.folder.glob("*.safetensors"))
        )
        if len(found) != 1:
            what = (
                "no *.safetensors weights"
                if not found
                else f"several weight files ({', '.join(found[:3])}) and no {INDEX}"
            )
            raise ModelError(
                f"{self.label} '{self.folder}' holds {what}; save the model with save_pretrained(..., safe_serialization=True)"
            )
        return dict.fromkeys(self._handle(found[0]).offset_keys(), found[0])

    def _of_index(self, listed: dict[str, str], files: Sequence[str]) -> dict[str, str]:
        located: dict[str, str] = {}
        for file in files:
            wanted = [name for name, of in listed.items() if of == file]
            if Path(file).name != file or not (self.folder / file).is_file():
                raise ModelError(
                    f"{self.label} '{self.folder}': shard '{file}' is missing; it holds tensor '{wanted[0]}' and {len(wanted) - 1} "
                    "more: copy or download it again"
                )
            there = [name for name in self._handle(file).offset_keys() if listed.get(name) == file]
            if lost := sorted(set(wanted) - set(there)):
                raise ModelError(
                    f"{self.label} '{self.folder}': tensor '{lost[0]}' should be in shard '{file}' and is not; the index belongs to "
                    "other shards: download or save the model again"
                )
            located |= dict.fromkeys(there, file)
        return located

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self.folder / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{self.label} '{self.folder}': '{file}' cannot be read as safetensors ({error}); it is cut short or damaged: "
                    "copy or download it again"
                ) from error
        return self._handles[file]

    def _spec(self, name: str) -> TensorSpec:
        piece = self._handle(self._file_of[name]).get_slice(name)
        code = piece.get_dtype()
        whole = code in ("I8", "U8") and name.endswith(".weight")
        if code not in DTYPES or whole or name.endswith(_QUANTISED):
            raise ModelError(
                f"tensor '{name}' of {self.label} '{self.folder}' is quantised ({code}); restoration computes with the weights "
                "themselves: give the checkpoint from before quantisation"
            )
        return TensorSpec(name, DTYPES[code], tuple(piece.get_shape()))

    def _read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle(self._file_of[name]).get_tensor(name)
        return tensor

    def _drop_tied(self) -> None:
        """A tied output layer that is stored besides is the embedding once more, and is not written again."""
        if not _of_text(self.config).get("tie_word_embeddings", False):
            return
        output = next((name for name in self._spec_of if name.endswith(_OUTPUTS)), None)
        embedding = next((name for name in self._spec_of if name.endswith(_EMBEDDINGS)), None)
        if output is None or embedding is None:
            return
        if not torch.equal(self._read(output), self._read(embedding)):
            raise ModelError(
                f"tensor '{output}' of {self.label} '{self.folder}' is tied to '{embedding}' by its config.json, and its values are "
                "others; set tie_word_embeddings to false there if the stored ones are meant, or remove the tensor"
            )
        del self._spec_of[output], self._file_of[output]


def read_config(folder: Path, label: str) -> dict[str, Any]:
    """The `config.json` of a full checkpoint.

    Raises:
        ModelError: there is none, or the checkpoint is quantised.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{label} '{folder}' has no readable config.json ({type(error).__name__}); give the folder that save_pretrained wrote"
        ) from error
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise ModelError(
            f"{label} '{folder}' is quantised ({method}); restoration computes with the weights themselves: give the checkpoint "
            "from before quantisation, or dequantise and save it"
        )
    return config


def _of_text(config: dict[str, Any]) -> dict[str, Any]:
    """The part about the language model, where a model has others besides."""
    nested = config.get("text_config")
    return {**nested, **config} if isinstance(nested, dict) else config
