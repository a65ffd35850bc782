"""Figures of a training's log that are means over the rows, tokens or steps of all processes, each by its weight."""

from collections.abc import Mapping
from typing import Any

from ballast.pipeline import ranks

Sums = Mapping[str, tuple[float, float]]  # name to sum and weight


def means_over_processes(sums: Sums) -> dict[str, float]:
    """Sum over weight of each figure, over all processes; a process may lack a figure, and one without weight is left out.

    All processes call it together.
    """
    total: dict[str, list[float]] = {}
    for own in ranks.collected([{name: list(pair) for name, pair in sums.items()}]):
        for name, (value, weight) in own.items():
            into = total.setdefault(name, [0.0, 0.0])
            into[0], into[1] = into[0] + value, into[1] + weight
    return {name: value / weight for name, (value, weight) in sorted(total.items()) if weight > 0}


class LoggedMeans:
    """Mixin in front of a Trainer's class: what `note_mean` is given since the last log is in the next one."""

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sums: dict[str, dict[str, tuple[float, float]]] = {"train": {}, "eval": {}}
        super().__init__(*args, **kwargs)

    def note_mean(self, name: str, total: float, weight: float) -> None:
        """Add to a figure.

        Args:
            name: its key in the log.
            total: sum over the rows, tokens or steps of this process.
            weight: how many there were.
        """
        sums = self._sums["train" if self.model.training else "eval"]
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + total, before[1] + weight)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own, with the means added."""
        mode = "train" if self.model.training else "eval"
        means, self._sums[mode] = means_over_processes(self._sums[mode]), {}
        logs |= {name if mode == "train" else f"eval_{name}": value for name, value in means.items()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
