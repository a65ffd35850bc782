"""What every restoration reads: the weights of a model, one tensor at a time, in whatever form they lie on the disk.

A full checkpoint (`shards.Checkpoint`) and a LoRA over one (`adapters.Adapter`) are both `Weights`. A method sees
tensors by name and, where a model is a LoRA over another, the two thin factors of their difference.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ballast.errors import ModelError

# Buffers that old checkpoints store and new ones compute.
_COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "position_ids")


@dataclass(frozen=True)
class Factors:
    """A difference of two weights as a product `left @ right`, exact.

    Attributes:
        left: (m, r), fp32, with the adapter's scaling in it.
        right: (r, n), fp32.
    """

    left: torch.Tensor
    right: torch.Tensor

    def dense(self) -> torch.Tensor:
        """(m, n)."""
        return self.left @ self.right

    def to(self, device: torch.device | str) -> "Factors":
        """Both on a device."""
        return Factors(self.left.to(device), self.right.to(device))


class Weights(Protocol):
    """The weights of one model.

    Attributes:
        label: what the model is here, for messages: base, aligned, tuned.
        folder: where it lies.
        config: its `config.json`.
        names: names of its tensors, in the order of its files. A tied output layer is not among them.
    """

    label: str
    folder: Path
    config: dict[str, Any]
    names: tuple[str, ...]

    @property
    def base(self) -> "Weights | None":
        """The model that this one is a LoRA over; None for a full checkpoint."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from the header of its file."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is stored; for a LoRA, that of its base."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, not to be written into: it may be the mapped file.

        Full checkpoints give it as stored, a LoRA gives the touched tensors merged in fp32, not cast back.

        Raises:
            ModelError: it is not there, or holds NaN or infinity.
        """
        ...

    def factors(self, name: str) -> Factors | None:
        """Over `base`; None where the two differ in no such way, see `differs`."""
        ...

    def differs(self, name: str) -> bool:
        """Whether the tensor may differ from that of `base`; True for a full checkpoint."""
        ...

    def files(self) -> list[Path]:
        """The files with its weights, those of its base excluded."""
        ...


def difference(after: Weights, before: Weights, name: str) -> Factors | torch.Tensor | None:
    """`after - before` of one tensor.

    Returns:
        Factors where `after` is a LoRA over `before`, or both are LoRAs over one model; None where the two are the same there; else the difference in
        fp32, a tensor of its own.
    """
    if after is before:
        return None
    if after.base is before:
        if not after.differs(name):
            return None
        factors = after.factors(name)
        if factors is not None:
            return factors
    if after.base is not None and after.base is before.base:
        return _of_siblings(after, before, name)
    return own_fp32(after.tensor(name)).sub_(before.tensor(name))


def _of_siblings(after: Weights, before: Weights, name: str) -> Factors | torch.Tensor | None:
    """Two LoRAs over one model: the base cancels, and the factors stand side by side."""
    sides = [(weights, weights.factors(name)) for weights in (after, before) if weights.differs(name)]
    if not sides:
        return None
    if any(factors is None for _, factors in sides):
        return own_fp32(after.tensor(name)).sub_(before.tensor(name))
    lefts = [factors.left if weights is after else -factors.left for weights, factors in sides if factors is not None]
    rights = [factors.right for _, factors in sides if factors is not None]
    return Factors(torch.cat(lefts, dim=1), torch.cat(rights, dim=0))


def own_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """In fp32, in memory of its own, so that it may be written into."""
    return tensor.clone() if tensor.dtype == torch.float32 else tensor.float()


def check_alike(first: Weights, second: Weights) -> None:
    """Two models have the same architecture, the same tensors and the same shapes.

    Raises:
        ModelError: they have not; the first tensor that differs is named.
    """
    pair = f"{first.label} '{first.folder}' and {second.label} '{second.folder}'"
    for key in ("model_type", "architectures"):
        one, other = first.config.get(key), second.config.get(key)
        if one != other:
            raise ModelError(
                f"{pair} are different architectures ({key} {one} and {other}); restoration compares weights by name, so give "
                "models that were trained from one another"
            )
    mine, others = set(first.names), set(second.names)
    lacking = sorted(name for name in mine ^ others if not name.endswith(_COMPUTED))
    if lacking:
        name = lacking[0]
        has, lacks = (first, second) if name in mine else (second, first)
        raise ModelError(f"tensor '{name}' is in {_of(has)} and not in {_of(lacks)}; {_remedy(name)}")
    for name in first.names:
        if name in others and first.shape(name) != second.shape(name):
            raise ModelError(
                f"tensor '{name}' is {_by(first.shape(name))} in {_of(first)} and {_by(second.shape(name))} in {_of(second)}; "
                + (
                    "the vocabularies differ: resize the embeddings of all models to one size and save them again"
                    if _is_vocabulary(name)
                    else "give models of one architecture and size"
                )
            )


def check_finite(tensor: torch.Tensor, name: str, weights: Weights) -> torch.Tensor:
    """The tensor itself.

    Raises:
        ModelError: it holds NaN or infinity.
    """
    if tensor.is_floating_point() and not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"tensor '{name}' of {_of(weights)} holds {bad} values that are NaN or infinite; the training that made it diverged or "
            "the file is damaged: take an earlier checkpoint or download it again"
        )
    return tensor


def frobenius(matrix: torch.Tensor) -> float:
    """The norm, summed in double precision, a block of rows at a time: a copy in double would be twice the tensor."""
    rows = max(1, 1_000_000 // max(1, matrix.shape[-1]))
    return math.sqrt(sum(float(block.double().square().sum()) for block in matrix.split(rows)))


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; without a mask, or a copy, of the tensor's size."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # both are NaN where one value is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _of(weights: Weights) -> str:
    return f"{weights.label} '{weights.folder}'"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _is_vocabulary(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "lm_head.weight"))


def _remedy(name: str) -> str:
    if name.endswith("lm_head.weight"):
        return "one model ties its output layer to its embedding and the other does not: save both tied, or both untied"
    if any(part in name for part in ("qkv", "gate_up", "query_key_value", "c_attn")):
        return (
            "one model stores these matrices fused and the other apart: save both with the same version of transformers"
        )
    return "give models of one architecture, saved by save_pretrained"
