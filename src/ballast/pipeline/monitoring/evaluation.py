"""One evaluation: the policy answers the suite, and a fall that is luck is told from one that is not."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ballast.pipeline.monitoring.answers import Measured, SuiteMeasure
from ballast.pipeline.monitoring.trip import Decision, Sample, TripRule, decide, pooled, scored_prompts

Baseline = Mapping[str, Sample]  # `risk` and `gibberish` before training


def baseline_of(measured: Measured) -> dict[str, Sample]:
    """What later evaluations are compared with.

    Raises:
        DataError: no answer to a harmful prompt was scored.
    """
    scored_prompts(measured.risk)
    return {"risk": measured.risk, "gibberish": measured.gibberish}


def evaluate(
    measure: SuiteMeasure, model: Any, baseline: Baseline, rule: TripRule, *, step: int, seed: int, folder: Path
) -> tuple[Measured, Decision]:
    """Measure a policy in training, once more where the rule asks for it, and decide.

    Args:
        measure: measures it.
        model: the policy.
        baseline: before training, as `baseline_of` gives it.
        rule: the bounds.
        step: optimizer steps done.
        seed: of sampling and test.
        folder: the answers of the first sample are written here.

    Returns:
        The first sample, and what it or both samples together say.

    Raises:
        GuardError: the judge left too much unscored.
    """
    when = f"at step {step}"
    # The baseline's seed: equal models give equal answers, and what differs between them is not luck.
    measured = measure(model, seed, when)
    measured.write(folder / f"step-{step:05d}.parquet")
    decision = decide(baseline["risk"], measured.risk, rule, last_look=False, seed=seed)
    if decision.outcome == "sample_again":
        greedy = measure.sampling.temperature == 0  # which would give the same answers once more
        now = measured.risk
        if not greedy:
            now = pooled(now, measure(model, seed + step, when).risk)
        decision = decide(baseline["risk"], now, rule, last_look=True, seed=seed)
    return measured, _unless_gibberish(decision, measured, baseline, rule, seed)


def _unless_gibberish(
    decision: Decision, measured: Measured, baseline: Baseline, rule: TripRule, seed: int
) -> Decision:
    """Guards call gibberish safe: a model that has lost its language is neither safe nor a good point."""
    if decision.outcome == "trip":
        return decision
    floor = TripRule(rule.hard_floor, 0.0, rule.false_trips, rule.evaluations)
    readable = decide(baseline["gibberish"], measured.gibberish, floor, last_look=False, seed=seed)
    if readable.outcome == "trip":
        reason = "the share of readable answers is below the hard floor, and significantly"
        return Decision("trip", reason, None, None, readable.p_value, readable.prompts)
    return decision


def figures_of(measured: Measured, seed: int) -> dict[str, Any]:
    """The figures of `Measured` as plain values, for an event."""
    return {name: asdict(figure) for name, figure in measured.figures(seed).items()}
