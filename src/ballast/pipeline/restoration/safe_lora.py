"""Safe LoRA: what a tuning changed is projected onto the alignment wherever it leads away from it (Hsu et al. 2024).

    V = W_aligned - W_base,   D = W_tuned - W_aligned,   C = V V^T / ||V||_F
    W' = W_aligned + C D   where cos(C D, D) < tau, else W_tuned

The cosine is that of the two matrices as vectors. C is the paper's: no projection in the strict sense, for it also
scales by the size of the alignment, so a small alignment leaves little of the tuning. C itself, m x m, is never
formed where a smaller product does: `V (V^T B) A` for a LoRA, and by the shorter side else.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ballast.errors import ConfigError
from ballast.pipeline.restoration.methods import LAYERS, Change, Triple, is_matrix, matches
from ballast.pipeline.restoration.weights import Factors, frobenius

_BLOCK = 1024  # rows or columns that are computed at a time


@dataclass(frozen=True)
class SafeLora:
    """The method.

    Attributes:
        tau: a tensor is projected where the cosine is below, in [-1, 1]; -1 changes nothing.
        modules: patterns of the names of the matrices.

    Raises:
        ConfigError: a value out of its range.
    """

    tau: float = 0.35
    modules: tuple[str, ...] = LAYERS

    name = "safe-lora"

    def __post_init__(self) -> None:
        if not -1 <= self.tau <= 1:
            raise ConfigError(
                f"safe-lora: tau {self.tau} is no cosine; choose -1 (nothing) to 1 (every tensor), such as 0.35"
            )

    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        return asdict(self)

    def selects(self, name: str, shape: Sequence[int]) -> bool:
        """See `Method`."""
        return is_matrix(shape) and matches(name, self.modules)

    def change(self, at: Triple) -> Change:
        """See `Method`."""
        tuning = at.tuning() if self.tau > -1 else None
        alignment = at.alignment() if tuning is not None else None
        if tuning is None or alignment is None:
            return Change(None)
        projected, cosine = project(alignment, tuning)
        del alignment, tuning
        if projected is None or cosine >= self.tau:
            return Change(None, {"cosine": cosine})
        if isinstance(projected, Factors):
            tensor = at.start(at.aligned).addmm_(projected.left, projected.right)
        else:
            tensor = projected.add_(at.aligned.tensor(at.name).to(projected.device))
        return Change(tensor, {"cosine": cosine})


def project(
    alignment: Factors | torch.Tensor, tuning: Factors | torch.Tensor
) -> tuple[Factors | torch.Tensor | None, float]:
    """`C D` and its cosine with D.

    Args:
        alignment: V, (m, n) or its factors.
        tuning: D, (m, n) or its factors. Where both are matrices, one of the two is overwritten with the result.

    Returns:
        C D, as factors where one of the two has some, and the cosine; None and 1.0 where V or D is 0, for which there
        is no C or nothing to project.
    """
    size, length = _norm(alignment), _norm(tuning)
    if size == 0 or length == 0:
        return None, 1.0
    if isinstance(alignment, torch.Tensor) and isinstance(tuning, torch.Tensor):
        return _dense(alignment, tuning, size, length)
    if isinstance(alignment, Factors):
        left, right = alignment.left, alignment.right
        onto = left.T @ tuning.left @ tuning.right if isinstance(tuning, Factors) else left.T @ tuning
        product = Factors(left, (right @ right.T) @ onto / size)
    else:
        assert isinstance(tuning, Factors)
        product = Factors(alignment @ (alignment.T @ tuning.left) / size, tuning.right)
    inner = _inner(product, tuning)
    return product, inner / (_norm(product) * length) if inner else 0.0


def _dense(v: torch.Tensor, d: torch.Tensor, size: float, length: float) -> tuple[torch.Tensor, float]:
    m, n = v.shape
    inner = square = 0.0
    # C D is V (V^T D) or (V V^T) D: the one whose middle is square in the shorter side.
    middle = (v @ v.T if m <= n else v.T @ d).div_(size)
    if m <= n:
        for i in range(0, n, _BLOCK):
            part = d[:, i : i + _BLOCK]
            made = middle @ part
            inner, square = inner + _dot(made, part), square + _dot(made, made)
            part.copy_(made)
        result = d
    else:
        for i in range(0, m, _BLOCK):
            made = v[i : i + _BLOCK] @ middle
            inner, square = inner + _dot(made, d[i : i + _BLOCK]), square + _dot(made, made)
            v[i : i + _BLOCK] = made
        result = v
    return result, inner / (math.sqrt(square) * length) if square else 0.0


def _norm(x: Factors | torch.Tensor) -> float:
    if isinstance(x, torch.Tensor):
        return frobenius(x)
    return math.sqrt(max(_inner(x, x), 0.0))


def _inner(x: Factors, y: Factors | torch.Tensor) -> float:
    """Sum of the products of the entries: tr(x^T y)."""
    if isinstance(y, torch.Tensor):
        return _dot(x.left.T @ y, x.right)
    left, right = x.left.double().T @ y.left.double(), x.right.double() @ y.right.double().T
    return float((left * right).sum())


def _dot(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() * y.double()).sum())
