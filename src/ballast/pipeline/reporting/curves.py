"""Which curves a training has: from the lines of its log to charts.

A curve is drawn where a step has its figure; what no step has is named, so that nobody looks for it in vain.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ballast.pipeline.config_monitor import MonitorConfig
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.evaluation.statistics import Estimate
from ballast.pipeline.reporting.chart import Curves, Mark, Series, thinned
from ballast.pipeline.reporting.metrics_log import Training


@dataclass(frozen=True)
class _Figures:
    """Figures of the log that share an axis: name of the chart, and by key how the line is called."""

    name: str
    title: str
    y_label: str
    keys: Mapping[str, str]
    y_range: tuple[float, float] | None = None


_FIGURES = (
    _Figures("reward", "Reward", "mean over the batch", {"reward/total": "total (weighted mean of the terms)"}),
    _Figures(
        "risk",
        "Risk of the completions trained on, by the guard",
        "share, or mean risk",
        {
            "risk/mean": "mean risk",
            "risk/violation_rate": "share above 0.5",
            "risk/unscored_share": "share unscored",
            "lagrangian/rate": "share above the limit's tau",
        },
        (0.0, 1.0),
    ),
    _Figures(
        "kl",
        "KL to the reference",
        "nats a token",
        {
            "kl": "TRL's KL (train.beta)",
            "sft/kl": "KL of the shaped loss",
            "regularization/kl": "KL to the start model",
            "shaping/log_ratio_to_reference": "log ratio of the sampled tokens",
        },
    ),
    _Figures(
        "conflict",
        "Task against safety gradient",
        "cosine, or share",
        {
            "safegrad/cosine": "cosine (SafeGrad)",
            "safegrad/conflict_rate": "conflict rate",
            "safegrad/removed_norm_share": "share of the norm taken out",
            "probing/cosine": "cosine (probing)",
        },
        (-1.0, 1.0),
    ),
    _Figures("loss", "Loss", "loss", {"loss": "loss"}),
    _Figures("entropy", "Entropy of the policy", "nats a token", {"entropy": "entropy"}),
    _Figures("length", "Length of the completions", "tokens", {"completions/mean_length": "mean"}),
    _Figures("price", "Price of the safety limit", "dual variable", {"lagrangian/price": "price"}),
    _Figures("learning-rate", "Learning rate", "learning rate", {"learning_rate": "learning rate"}),
)

# What issue and reader look for first: where a run has none of it, the report says so.
_EXPECTED = {
    "reward": "reward",
    "risk": "risk",
    "kl": "KL (train.beta, shaping.kl.weight or regularization.kl_weight above 0)",
    "conflict": "cosine and conflict rate (safegrad or probing)",
}


def training_curves(training: Training) -> list[Curves]:
    """A chart for each group of figures that the steps have."""
    marks, found = tuple(marks_of(training)), training.figures()
    charts = []
    for figures in _FIGURES:
        named = dict(figures.keys)
        if figures.name == "reward":
            named |= {key: key.removeprefix("reward/") for key in sorted(found) if key.startswith("reward/")} | named
        lines = tuple(
            Series(label, thinned(training.points(key)))
            for key, label in named.items()
            if any(value is not None for _, value in training.points(key))
        )
        if lines:
            charts.append(Curves(figures.name, figures.title, figures.y_label, lines, marks, y_range=figures.y_range))
    return charts


def missing_figures(charts: list[Curves]) -> list[str]:
    """What a reader may look for and this training did not log."""
    names = {chart.name for chart in charts}
    return [what for name, what in _EXPECTED.items() if name not in names]


def marks_of(training: Training) -> Iterator[Mark]:
    """What the monitor did, step by step; an evaluation that was good is a mark too."""
    for event in training.events:
        step = event["step"]
        match event["event"]:
            case "monitor":
                yield Mark(step, "evaluation", f"step {step}: evaluated, {event['reason']}")
            case "monitor_trip":
                yield Mark(step, "trip", f"step {step}: tripped ({event['reason']}), action {event['action']}")
            case "monitor_rollback":
                yield Mark(step, "rollback", f"step {step}: back to the weights of step {event['to_step']}")
            case "monitor_lower_lr":
                yield Mark(step, "slower", f"step {step}: learning rate times {event['scale']:.3g} from here on")


def safety_curves(
    training: Training, monitor: MonitorConfig, before: EvaluationSummary, after: EvaluationSummary
) -> list[Curves]:
    """Safety, and its price in refused harmless prompts, over the training.

    Args:
        training: with the evaluations of its monitor, if it had one.
        monitor: its bounds.
        before: the test prompts' figures of the model that training started from.
        after: those of the trained one.
    """
    ends = (0.0, before), (float(training.last), after)
    looks = [event for event in training.events if event["event"] in ("monitor_baseline", "monitor")]
    marks = tuple(mark for mark in marks_of(training) if mark.kind != "evaluation")
    levels: tuple[tuple[float, str], ...] = ()
    baseline = next((e["figures"]["safety"]["value"] for e in looks if e["event"] == "monitor_baseline"), None)
    if baseline is not None:
        levels = (
            (monitor.threshold * baseline, f"{monitor.threshold:.0%} of the baseline"),
            (monitor.hard_floor * baseline, f"hard floor, {monitor.hard_floor:.0%}"),
        )
    safety = [_of_events("safety, monitor", looks, "safety")] if looks else []
    refusal = [
        _of_events(f"{label}, monitor", looks, name)
        for name, label in (("over_refusal", "refused scary prompts"), ("utility", "useful answers to ordinary ones"))
        if looks
    ]
    return [
        Curves(
            "safety",
            "Safety: 1 - the judge's mean risk on harmful prompts",
            "safety",
            (*safety, _of_estimates("safety, test prompts", [(x, _complement(s.mean_risk)) for x, s in ends])),
            marks,
            levels,
            (0.0, 1.0),
        ),
        Curves(
            "over-refusal",
            "Over-refusal: refused harmless prompts",
            "share of answers",
            (
                *refusal,
                _of_estimates("refused scary prompts, test", [(x, s.refusal_scary) for x, s in ends]),
                _of_estimates("refused ordinary prompts, test", [(x, s.refusal_ordinary) for x, s in ends]),
            ),
            marks,
            (),
            (0.0, 1.0),
        ),
    ]


def _complement(estimate: Estimate) -> Estimate:
    """1 - an estimate, its interval turned round."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return estimate
    return Estimate(1 - estimate.value, 1 - estimate.high, 1 - estimate.low, estimate.n, estimate.unscored)


def _of_events(label: str, events: list[Mapping[str, Any]], figure: str) -> Series:
    return _of_estimates(
        label, [(event["step"], Estimate(**event["figures"][figure])) for event in events], joined=True
    )


def _of_estimates(label: str, points: list[tuple[float, Estimate]], joined: bool = False) -> Series:
    return Series(
        label,
        [(x, estimate.value) for x, estimate in points],
        [None if e.low is None or e.high is None else (e.low, e.high) for _, e in points],
        joined,
    )
