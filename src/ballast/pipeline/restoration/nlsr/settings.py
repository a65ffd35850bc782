"""What can be set of NLSR, with the paper's values as defaults."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ballast.errors import ConfigError
from ballast.pipeline.restoration.methods import LAYERS

_SHARES = ("sparsity", "share", "strength")


@dataclass(frozen=True)
class NLSRSettings:
    """Settings of a realignment; the defaults are the paper's, but for `choice`.

    Attributes:
        beta: how far the super-aligned reference lies beyond the aligned model, in multiples of the alignment; 0 takes the
            aligned model itself.
        sparsity: P_SR; of each module the share `1 - sparsity` of entries are safety neurons, found at that share of its
            rank. 1 finds none, 0 takes all.
        rank: r of the alignment's change in each module, of which `r (1 - sparsity)` is kept; None takes that of its LoRA,
            or of the whole matrix.
        share: of the layers, those least similar to the reference, that are patched; with `choice` sample, the mean
            probability. 0 patches none, 1 all.
        choice: `rank` takes the least similar ones, always the same; `sample` draws them as in the paper.
        spread: with `sample`, probabilities go from `share - spread` to `share + spread`.
        seed: of that draw.
        unit: what a layer is: one linear `module` (as in the paper's code), or all of a decoder `layer` together.
        strength: how far a patched entry goes from the tuned to the reference's value; 1 replaces it, 0 changes nothing.
        modules: patterns of the names of the tensors that are looked at.
    """

    beta: float = 0.9
    sparsity: float = 0.8
    rank: int | None = None
    share: float = 0.5
    choice: Literal["rank", "sample"] = "rank"
    spread: float = 0.2
    seed: int = 0
    unit: Literal["module", "layer"] = "module"
    strength: float = 1.0
    modules: tuple[str, ...] = LAYERS

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        for name in _SHARES:
            self._check(name, lambda v: 0.0 <= v <= 1.0, "is a share: give a number from 0 to 1")
        self._check("beta", lambda v: 0.0 <= v < float("inf"), "extrapolates beyond the aligned model: give 0 or more")
        self._check("spread", lambda v: 0.0 <= v <= 1.0, "is added to a share: give a number from 0 to 1")
        self._check("rank", lambda v: v is None or v >= 1, "is a number of directions: give 1 or more, or leave it out")
        self._check("choice", lambda v: v in ("rank", "sample"), "must be rank or sample")
        self._check("unit", lambda v: v in ("module", "layer"), "must be module or layer")

    def _check(self, name: str, holds: Callable[[Any], bool], said: str) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise ConfigError(f"nlsr: {name} = {value!r} {said}")

    def record(self) -> Mapping[str, Any]:
        """As it goes into the record of a restored model."""
        return asdict(self)
