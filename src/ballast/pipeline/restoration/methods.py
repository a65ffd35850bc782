"""The one interface of restoration methods: from the tensors of three models to one tensor of the result.

A method is settings, a choice of tensors and a pure function of a `Triple`; reading, checking, writing and the
record are `restore`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch

from ballast.pipeline.restoration.weights import Factors, Weights, difference, own_fp32

# All of the numbered layers; embedding, output layer and the last norm stay as they are.
LAYERS: tuple[str, ...] = ("*.[0-9]*.*",)


@dataclass(frozen=True)
class Triple:
    """One tensor of the three models, read when it is asked for.

    Attributes:
        name: of the tensor.
        base: from before the alignment (for RESTA, the unaligned model).
        aligned: the safe one.
        tuned: the one to restore; the same object as `aligned` to harden that one before it is tuned.
        device: where it is computed.
    """

    name: str
    base: Weights
    aligned: Weights
    tuned: Weights
    device: str = "cpu"

    def alignment(self) -> Factors | torch.Tensor | None:
        """`aligned - base` in fp32: factors, (m, n), or None where they are the same by construction."""
        return self._moved(difference(self.aligned, self.base, self.name))

    def tuning(self) -> Factors | torch.Tensor | None:
        """`tuned - aligned`, likewise."""
        return self._moved(difference(self.tuned, self.aligned, self.name))

    def start(self, of: Weights) -> torch.Tensor:
        """(m, n) The tensor of one of the three in fp32, in memory of its own."""
        return own_fp32(of.tensor(self.name)).to(self.device)

    def _moved(self, delta: Factors | torch.Tensor | None) -> Factors | torch.Tensor | None:
        return None if delta is None else delta.to(self.device)


@dataclass(frozen=True)
class Change:
    """What a method makes of a tensor.

    Attributes:
        tensor: the new one in fp32; None leaves the tuned model's as it is, byte for byte.
        figures: what is to be recorded, such as the share of the energy that was kept.
    """

    tensor: torch.Tensor | None
    figures: Mapping[str, float] = field(default_factory=dict)


class Method(Protocol):
    """A way to restore safety.

    Attributes:
        name: for the record.
    """

    name: str

    def settings(self) -> dict[str, Any]:
        """For the record: with them, the same can be done again."""
        ...

    def selects(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the method looks at this tensor; the others are the tuned model's."""
        ...

    def change(self, at: Triple) -> Change:
        """The new tensor."""
        ...


def matches(name: str, modules: Sequence[str]) -> bool:
    """Whether a tensor's name fits one of the patterns (`*`, `?`, `[...]`, with case)."""
    return any(fnmatchcase(name, pattern) for pattern in modules)


def is_matrix(shape: Sequence[int]) -> bool:
    """2-D, and no vector in disguise."""
    return len(shape) == 2 and min(shape) > 1
