"""How often the monitor's trip rule acts on nothing, and how often it sees a real fall.

    python benchmarks/trip_rule.py --out benchmarks/results/trip_rule.json
    python benchmarks/trip_rule.py --lowering --runs 200 --trials 100 --out benchmarks/results/trip_rule_lowering.json

Simulated, with the functions that training uses. Every prompt of a suite has a tendency of its own, every answer to it a
chance of its own. Two shapes of risk, since guards differ: `graded` (logit of the risk is normal around the prompt's own;
the model's fall shifts all prompts) and `two peaks` (an answer is unsafe with the prompt's own probability, and its risk
lies near 0 or near 1, so that risk says little more than the verdict). The constant model's answers to a prompt change their
verdict in about 4% of all pairs of samples in either direction, and 80% of them are safe; a fall by x points makes that 80 - x%.

Compared on the same answers: the rule on risks, the rule on verdicts (risks rounded to 0 and 1), and McNemar's exact
test of the first sample alone.

`--lowering` simulates what lies below a trip, with the rule on risks: how often a constant model's learning rate is lowered, how
often it would be were every fall acted on that two samples leave below the threshold, and how often a real fall is acted on,
be it by a trip or by a lower rate.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ballast.pipeline.evaluation.statistics import mcnemar_exact, wilson_interval
from ballast.pipeline.monitoring.trip import Decision, Sample, TripRule, decide, pooled

SIZES = (50, 100, 200, 400)
FALLS = (0.0, 0.05, 0.10, 0.20)
EVALUATIONS = 20
UNSAFE = 0.20  # share of unsafe answers of the constant model
ALPHA_MCNEMAR = 0.0026  # .05 over 20 tests

# Of the constant model: spread of prompts and of answers to one prompt, so that about 4% of pairs change either way.
PROMPT_SD, ANSWER_SD = 3.0, 0.75
CHANCE_SPREAD = 0.33  # a + b of the Beta of a prompt's chance: E[p (1 - p)] = .16 * .33 / 1.33 = .04
UNSAFE_RISK, SAFE_RISK = (8.0, 1.0), (1.0, 8.0)  # Beta shapes of an answer's risk; few cross .5

Draw = Callable[[float, int], Any]


def graded(size: int, random: Any) -> Draw:
    """A suite whose answers have risks anywhere in (0, 1)."""
    total_sd = float(np.hypot(PROMPT_SD, ANSWER_SD))
    prompt_P = random.normal(0, PROMPT_SD, size)

    def draw(fall: float, samples: int) -> Any:
        middle = total_sd * stats.norm.ppf(UNSAFE + fall)
        logit_PS = middle + prompt_P[:, None] + random.normal(0, ANSWER_SD, (size, samples))
        return 1 / (1 + np.exp(-logit_PS))

    return draw


def two_peaks(size: int, random: Any) -> Draw:
    """A suite whose answers have risks near 0 or near 1."""
    rank_P = random.random(size)

    @functools.cache
    def chances(fall: float) -> Any:
        # The prompts keep their order: a fall makes all of them likelier to be answered unsafely.
        mean = UNSAFE + fall
        return stats.beta.ppf(rank_P, mean * CHANCE_SPREAD, (1 - mean) * CHANCE_SPREAD)

    def draw(fall: float, samples: int) -> Any:
        chance_P = chances(fall)
        unsafe_PS = random.random((size, samples)) < chance_P[:, None]
        high, low = (random.beta(*shape, (size, samples)) for shape in (UNSAFE_RISK, SAFE_RISK))
        return np.where(unsafe_PS, high, low)

    return draw


def sample(risk_PS: Any) -> Sample:
    """Risks as the rule takes them."""
    return {f"{i:04d}": tuple(row) for i, row in enumerate(risk_PS.tolist())}


def looks(baseline_PB: Any, first_P1: Any, second_P1: Any, rule: TripRule, seed: int) -> Decision:
    """One evaluation: a decision, and where it asks for it the second sample's."""
    baseline, first = sample(baseline_PB), sample(first_P1)
    decision = decide(baseline, first, rule, last_look=False, seed=seed)
    if decision.outcome == "sample_again":
        decision = decide(baseline, pooled(first, sample(second_P1)), rule, last_look=True, seed=seed)
    return decision


def tested(baseline_PB: Any, draw: Draw, fall: float, rule: TripRule, seed: int) -> dict[str, str]:
    """The outcome of each test at one evaluation of a model that has fallen so far."""
    first, second = draw(fall, 1), draw(fall, 1)
    verdict = [(risk >= 0.5).astype(float) for risk in (baseline_PB, first, second)]
    before, after = verdict[0][:, 0], verdict[1][:, 0]
    worse, better = int((after > before).sum()), int((after < before).sum())
    fell = after.mean() > before.mean() and mcnemar_exact(worse, better) < ALPHA_MCNEMAR
    return {
        "risk": looks(baseline_PB, first, second, rule, seed).outcome,
        "verdict": looks(verdict[0], verdict[1], verdict[2], rule, seed).outcome,
        "mcnemar": "trip" if fell else "good",
    }


def constant_model(shape: Callable[[int, Any], Draw], size: int, runs: int, baseline_samples: int) -> dict[str, Any]:
    """Share of runs of a constant model that trip at any of their evaluations, by test."""
    rule, tripped = TripRule(evaluations=EVALUATIONS), {}
    for run in range(runs):
        random = np.random.default_rng((1, size, run))
        draw = shape(size, random)
        baseline_PB = draw(0.0, baseline_samples)
        seen = [tested(baseline_PB, draw, 0.0, rule, i) for i in range(EVALUATIONS)]
        for test in seen[0]:
            tripped[test] = tripped.get(test, 0) + any(outcome[test] == "trip" for outcome in seen)
    return {test: share(count, runs) for test, count in tripped.items()}


def power(
    shape: Callable[[int, Any], Draw], size: int, fall: float, trials: int, baseline_samples: int
) -> dict[str, Any]:
    """Share of single evaluations of a fallen model that trip, by test; each with a baseline of its own."""
    rule, tripped = TripRule(evaluations=EVALUATIONS), {}
    for trial in range(trials):
        random = np.random.default_rng((2, size, round(100 * fall), trial))
        draw = shape(size, random)
        baseline_PB = draw(0.0, baseline_samples)
        for test, outcome in tested(baseline_PB, draw, fall, rule, trial).items():
            tripped[test] = tripped.get(test, 0) + (outcome == "trip")
    return {test: share(count, trials) for test, count in tripped.items()}


LEVELS = {"false_lowerings=.25": 0.25, "every fall": float(EVALUATIONS)}  # over a run; the second one asks for p < 1


def asks(decision: Decision, level: float) -> bool:
    """Whether a decision asks for a lower rate where that is allowed by chance so often in a run."""
    below = decision.outcome in ("lower_lr", "unsure")
    return below and decision.p_value is not None and decision.p_value < level / EVALUATIONS


def lowering(
    shape: Callable[[int, Any], Draw], size: int, runs: int, trials: int, baseline_samples: int
) -> dict[str, Any]:
    """A constant model's lowered rates a run and share of runs with any; shares of falls that are acted on."""
    rule = TripRule(evaluations=EVALUATIONS)

    def decisions(stream: tuple[int, ...], fall: float, evaluations: int) -> list[Decision]:
        draw = shape(size, np.random.default_rng(stream))
        baseline_PB = draw(0.0, baseline_samples)
        return [looks(baseline_PB, draw(fall, 1), draw(fall, 1), rule, i) for i in range(evaluations)]

    constant = [decisions((3, size, run), 0.0, EVALUATIONS) for run in range(runs)]
    result: dict[str, Any] = {name: {} for name in LEVELS}
    for name, level in LEVELS.items():
        lowered = [sum(asks(decision, level) for decision in run) for run in constant]
        result[name] = {"lowered_per_run": round(sum(lowered) / runs, 2), "runs": share(sum(map(bool, lowered)), runs)}
    for fall in FALLS[1:]:
        fallen = [decisions((4, size, round(100 * fall), trial), fall, 1)[0] for trial in range(trials)]
        for name, level in LEVELS.items():
            acted = sum(decision.outcome == "trip" or asks(decision, level) for decision in fallen)
            result[name][f"acted_on_{fall:.2f}"] = share(acted, trials)
    return result


def share(count: int, of: int) -> dict[str, Any]:
    """A share with its 95% interval."""
    estimate = wilson_interval(count, of)
    return {"share": round(count / of, 4), "interval": [round(estimate.low or 0.0, 4), round(estimate.high or 0.0, 4)]}


def churn(shape: Callable[[int, Any], Draw]) -> dict[str, float]:
    """Share of unsafe verdicts of the constant model, and of pairs of its answers that change either way."""
    risk_PS = shape(200_000, np.random.default_rng(0))(0.0, 2)
    first, second = risk_PS[:, 0] >= 0.5, risk_PS[:, 1] >= 0.5
    return {"unsafe": round(float(first.mean()), 3), "either_way": round(float((first & ~second).mean()), 3)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500, help="simulated runs of a constant model")
    parser.add_argument("--trials", type=int, default=300, help="simulated evaluations for each power")
    parser.add_argument(
        "--baseline-samples", type=int, nargs="+", default=[1], help="answers of each prompt in the baseline"
    )
    parser.add_argument("--lowering", action="store_true", help="simulate lower rates in place of trips")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    shapes: dict[str, Callable[[int, Any], Draw]] = {"graded": graded, "two peaks": two_peaks}
    lines = []
    for name, shape in shapes.items():
        for samples in arguments.baseline_samples:
            for size in SIZES:
                if arguments.lowering:
                    seen = lowering(shape, size, arguments.runs, arguments.trials, samples)
                    lines.append({"risk": name, "baseline_samples": samples, "prompts": size, "lowering": seen})
                    print(lowering_row(lines[-1]), flush=True)
                    continue
                false = constant_model(shape, size, arguments.runs, samples)
                seen = {f"{fall:.2f}": power(shape, size, fall, arguments.trials, samples) for fall in FALLS[1:]}
                lines.append(
                    {"risk": name, "baseline_samples": samples, "prompts": size, "false_trips": false, "power": seen}
                )
                print(row(lines[-1]), flush=True)
    rule = TripRule(evaluations=EVALUATIONS)
    result = {
        "command": " ".join(["python", "benchmarks/trip_rule.py", *(sys.argv[1:] if argv is None else argv)]),
        "seconds": round(time.perf_counter() - started, 1),
        "settings": {"runs": arguments.runs, "trials": arguments.trials, "evaluations": EVALUATIONS},
        "rule": {"threshold": 0.95, "hard_floor": 0.85, "alpha": rule.alpha, "lowering_alpha": rule.lowering_alpha},
        "constant_model": {name: churn(shape) for name, shape in shapes.items()},
        "lines": lines,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def row(line: dict[str, Any]) -> str:
    """A line of the table: false trips, then power, each as risk / verdict / McNemar in percent."""
    tests = ("risk", "verdict", "mcnemar")

    def cell(shares: dict[str, Any]) -> str:
        return " / ".join(f"{100 * shares[test]['share']:.1f}" for test in tests)

    powers = " | ".join(cell(shares) for shares in line["power"].values())
    return (
        f"| {line['risk']} | {line['baseline_samples']} | {line['prompts']} | {cell(line['false_trips'])} | {powers} |"
    )


def lowering_row(line: dict[str, Any]) -> str:
    """A line of the table: each figure with the milder level / without it."""
    with_, without = (line["lowering"][name] for name in LEVELS)
    rates = f"{with_['lowered_per_run']} / {without['lowered_per_run']}"
    keys = ("runs", *(f"acted_on_{fall:.2f}" for fall in FALLS[1:]))
    shares = " | ".join(f"{100 * with_[key]['share']:.0f} / {100 * without[key]['share']:.0f}" for key in keys)
    return f"| {line['risk']} | {line['prompts']} | {rates} | {shares} |"


if __name__ == "__main__":
    main()
