"""Which of several repaired models to keep: the safest of those that cost little."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ballast.pipeline.config_restore import RestoreConfig
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.evaluation.statistics import Estimate


@dataclass(frozen=True)
class Choice:
    """The outcome.

    Attributes:
        best: label of the model to keep; None where no repaired one is safer than the tuned one within the limits.
        excluded: why the others were out of the question, by label; empty where a model was only less safe.
    """

    best: str | None
    excluded: Mapping[str, tuple[str, ...]]


def choose(
    start: EvaluationSummary, tuned: EvaluationSummary, repaired: Mapping[str, EvaluationSummary], limits: RestoreConfig
) -> Choice:
    """The repaired model with the smallest unsafe share among those within the limits; the smaller mean risk decides ties.

    The limits are on the estimates, not on their intervals. A figure that does not exist for a model excludes it where
    it exists for the tuned one: what could not be measured is not taken for good.

    Args:
        start: the model that training started from.
        tuned: the one that was repaired.
        repaired: by label.
        limits: how much of the gain is to be kept, and so on.
    """
    excluded = {label: tuple(_breaches(start, tuned, summary, limits)) for label, summary in repaired.items()}
    within = {label: _risk(summary) for label, summary in repaired.items() if not excluded[label]}
    safer = {label: risk for label, risk in within.items() if risk < _risk(tuned)}
    return Choice(min(safer, key=lambda label: safer[label]) if safer else None, excluded)


def _breaches(
    start: EvaluationSummary, tuned: EvaluationSummary, repaired: EvaluationSummary, limits: RestoreConfig
) -> Iterator[str]:
    if repaired.unsafe_share.value is None:
        yield "no answer to a harmful prompt could be scored"
    for name, after in tuned.task.items():
        if after.value is None:
            continue
        before = start.task[name].value if name in start.task else None
        gain = max(after.value - before, 0.0) if before is not None else 0.0
        yield from _below(f"task {name}", repaired.task.get(name), after.value - (1 - limits.keep_gain) * gain)
    if tuned.coherent_share.value is not None:
        yield from _below("coherent", repaired.coherent_share, tuned.coherent_share.value - limits.max_incoherent)
    for kind in ("scary", "ordinary"):
        before_share: Estimate = getattr(tuned, f"refusal_{kind}")
        if before_share.value is not None:
            most = before_share.value + limits.max_over_refusal
            value = getattr(repaired, f"refusal_{kind}").value
            if value is None or value > most + 1e-9:
                yield f"refused {kind} {_shown(value)}, {most:.3f} allowed"


def _below(what: str, estimate: Estimate | None, least: float) -> Iterator[str]:
    value = None if estimate is None else estimate.value
    if value is None or value < least - 1e-9:
        yield f"{what} {_shown(value)}, {least:.3f} needed"


def _risk(summary: EvaluationSummary) -> tuple[float, float]:
    """What is made small; a model without figures is the worst."""
    unsafe, mean = summary.unsafe_share.value, summary.mean_risk.value
    return (1.0 if unsafe is None else unsafe, 1.0 if mean is None else mean)


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
