"""The dual variable of a limit on unsafe completions: the price that `shaping.lagrangian` takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DualVariable:
    """A price that rises while more completions are unsafe than allowed, and falls while fewer are.

    Attributes:
        value: lambda >= 0; what the next batch is priced by.
        rate: moving average of the share of unsafe completions; None before the first batch.
    """

    value: float
    rate: float | None = None

    def updated(
        self, rate: float, *, target: float, step: float = 0.05, ema: float = 0.9, maximum: float = 10.0
    ) -> "DualVariable":
        """Take in one batch: lambda <- clip(lambda + step * (average - target), 0, maximum).

        Args:
            rate: share of unsafe completions, over the scored ones of all processes, so that lambda is the same on
                each of them.
            target: share that is allowed.
            step: how fast lambda follows.
            ema: weight of the past in the average, in [0, 1).
            maximum: largest lambda.
        """
        # The first share is the average, so that a start at 0 does not pass for a safe past.
        average = rate if self.rate is None else ema * self.rate + (1 - ema) * rate
        return DualVariable(min(max(self.value + step * (average - target), 0.0), maximum), average)
