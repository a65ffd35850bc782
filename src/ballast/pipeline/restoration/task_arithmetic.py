"""RESTA: the safety of an aligned model as a vector that is added to a tuned one (Bhardwaj et al. 2024).

    W' = W_tuned + gamma * (W_aligned - W_base)

Task arithmetic with the alignment as the task (Ilharco et al. 2023). RESTA's own unaligned model, the aligned one
fine-tuned on harmful rows, goes in the place of the base.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ballast.errors import ConfigError
from ballast.pipeline.restoration.methods import Change, Triple, matches
from ballast.pipeline.restoration.weights import Factors


@dataclass(frozen=True)
class Resta:
    """The method.

    Attributes:
        gamma: how much of the vector is added, 0 or more; 0 changes nothing.
        modules: patterns of the names of the tensors, of any shape.

    Raises:
        ConfigError: a value out of its range.
    """

    gamma: float = 0.5
    modules: tuple[str, ...] = ("*",)

    name = "resta"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ConfigError(f"resta: gamma {self.gamma} is no strength; choose a finite number from 0, such as 0.5")

    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        return asdict(self)

    def selects(self, name: str, shape: Sequence[int]) -> bool:
        """See `Method`."""
        return matches(name, self.modules)

    def change(self, at: Triple) -> Change:
        """See `Method`."""
        vector = at.alignment() if self.gamma else None
        if vector is None:
            return Change(None)
        if isinstance(vector, Factors):
            tensor = at.start(at.tuned).addmm_(vector.left, vector.right, alpha=self.gamma)
            return Change(tensor)
        if not bool(vector.any()):
            return Change(None)
        return Change(vector.mul_(self.gamma).add_(at.tuned.tensor(at.name).to(vector.device)))
