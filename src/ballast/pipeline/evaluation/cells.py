"""Cells of tables: a value with its interval, `12% [5, 20]` or `0.31 [0.27, 0.36]`, and a dash for a figure that is not there."""

from ballast.pipeline.evaluation.statistics import Estimate

DASH = "–"


def percent(estimate: Estimate | None) -> str:
    """A share as a whole number of percent."""
    if estimate is None or estimate.value is None or estimate.low is None or estimate.high is None:
        return DASH
    return f"{estimate.value:.0%} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def number(estimate: Estimate | None) -> str:
    """A figure with two decimals."""
    if estimate is None or estimate.value is None or estimate.low is None or estimate.high is None:
        return DASH
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def change(estimate: Estimate) -> str:
    """A difference with three decimals and its sign."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "not measured"
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"
