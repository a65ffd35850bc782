"""LoX: low-rank extrapolation of the alignment (Perin et al. 2025).

    W' = W + alpha * U_k S_k V_k^T,   U S V^T = W_aligned - W_base

With W the aligned model's weight this hardens it before it is tuned, which is the paper's use; with W the tuned
model's it repairs that one afterwards. Too large an alpha breaks the language: try several and measure.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ballast.errors import ConfigError
from ballast.pipeline.restoration.low_rank import Svd, truncate
from ballast.pipeline.restoration.methods import LAYERS, Change, Triple, is_matrix, matches
from ballast.pipeline.restoration.models import open_models
from ballast.pipeline.restoration.restore import SHARD_BYTES, Restored, restore
from ballast.pipeline.restoration.weights import Factors


@dataclass(frozen=True)
class Lox:
    """The method.

    Attributes:
        rank: k, how many singular directions of the alignment are extrapolated; at least the rank of the alignment
            is plain extrapolation.
        alpha: by how much, 0 or more; 0 changes nothing.
        modules: patterns of the names of the matrices.
        svd: `auto`, `exact` or `randomised`; see `truncate`.

    Raises:
        ConfigError: a value out of its range.
    """

    rank: int = 6
    alpha: float = 1.25
    modules: tuple[str, ...] = LAYERS
    svd: Svd = "auto"

    name = "lox"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lox: rank {self.rank} extrapolates nothing; choose 1 or more (the paper uses 6)")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ConfigError(
                f"lox: alpha {self.alpha} is no strength; choose a finite number from 0 (the paper uses 1.25)"
            )

    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        return asdict(self)

    def selects(self, name: str, shape: Sequence[int]) -> bool:
        """See `Method`."""
        return is_matrix(shape) and matches(name, self.modules)

    def change(self, at: Triple) -> Change:
        """See `Method`."""
        delta = at.alignment() if self.alpha else None
        if delta is None or not _any(delta):
            return Change(None)
        if isinstance(delta, torch.Tensor) and self.rank >= min(delta.shape):
            # Every direction is wanted: nothing to decompose, and nothing lost by it.
            return Change(delta.mul_(self.alpha).add_(at.tuned.tensor(at.name).to(delta.device)), {"energy": 1.0})
        low = truncate(delta, self.rank, self.svd)
        del delta  # as large as the tensor itself, and no longer needed
        term = low.factors()
        tensor = at.start(at.tuned).addmm_(term.left, term.right, alpha=self.alpha)
        return Change(tensor, {"rank": float(len(low.s)), "energy": low.energy, "error": low.error})


def lox(
    base: str,
    aligned: str,
    tuned: str | None = None,
    *,
    out: str | Path,
    rank: int = 6,
    alpha: float = 1.25,
    modules: Sequence[str] = LAYERS,
    svd: Svd = "auto",
    device: str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    over: Mapping[str, str] | None = None,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> Restored:
    """Write a model with its alignment extrapolated: the tuned one, or the aligned one where no tuned one is given.

    Args:
        base: the model from before its alignment: a folder, a hub id or `embedded:...`.
        aligned: the aligned one, or a LoRA over the base.
        tuned: the one to repair, or a LoRA over one of the two; None hardens the aligned one.
        out: a new folder.
        rank: see `Lox`; so are `alpha`, `modules` and `svd`.
        device: where it is computed, such as `cuda`.
        shard_bytes: largest size of a weight file.
        over: see `open_models`.
        on_tensor: see `restore`.

    Raises:
        ConfigError: a value out of its range, or `out` is not free.
        ModelError: the models cannot be read or do not belong together; see `open_models`.
        RestorationError: the result is not finite, or cannot be written.
    """
    method = Lox(rank, alpha, tuple(modules), svd)
    return restore(method, open_models(base, aligned, tuned, over), Path(out), device, shard_bytes, on_tensor)


def _any(delta: Factors | torch.Tensor) -> bool:
    """Whether there is a difference at all."""
    if isinstance(delta, Factors):
        return bool(delta.left.any()) and bool(delta.right.any())
    return bool(delta.any())
