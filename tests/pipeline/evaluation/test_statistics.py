"""Intervals against known values, and the rule that unscored is never 0."""

import numpy as np
import pytest

from ballast.errors import DataError
from ballast.pipeline.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    clustered_share,
    mcnemar_exact,
    paired_difference,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # By hand with z = 1.959964: 0 of 10 ends at z^2 / (n + z^2) = 3.841459 / 13.841459.
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        # Newcombe (1998), table I, method 3: 81/263, 15/148, 1/29.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    estimate = wilson_interval(successes, n)
    assert estimate.value == successes / n
    assert estimate.low == pytest.approx(low, abs=6e-5)
    assert estimate.high == pytest.approx(high, abs=6e-5)


def test_a_share_of_nothing_has_no_value() -> None:
    nothing = Estimate(None, None, None, 0, unscored=2)
    assert wilson_interval(0, 0) == Estimate(None, None, None, 0)
    assert clustered_share([None, None]) == nothing
    assert bootstrap_mean([None, float("nan")]) == nothing
    assert paired_difference([None, 1.0], [1.0, float("inf")]) == nothing


def test_more_successes_than_trials_is_an_error() -> None:
    with pytest.raises(DataError, match="3 successes of 2"):
        wilson_interval(3, 2)


def test_unscored_values_are_left_out_and_counted_never_zero() -> None:
    # (0.2 + 0.6) / 2 = 0.4; with zeros for the other two it would be 0.2.
    estimate = bootstrap_mean([0.2, None, 0.6, float("nan")])
    assert estimate.value == pytest.approx(0.4)
    assert (estimate.n, estimate.unscored) == (2, 2)
    share = clustered_share([True, None, True, False])
    assert share.value == pytest.approx(2 / 3)
    assert (share.n, share.unscored) == (3, 1)


def test_the_bootstrap_resamples_prompts_not_completions() -> None:
    # 10 prompts, each with 20 equal samples: as uncertain as 10 values, not as 200.
    values = [float(i % 2) for i in range(10)]
    repeated = [v for v in values for _ in range(20)]
    prompts = [i for i in range(10) for _ in range(20)]
    one = bootstrap_mean(values, seed=3)
    clustered = bootstrap_mean(repeated, prompts, seed=3)
    naive = bootstrap_mean(repeated, seed=3)
    assert (clustered.low, clustered.high) == (one.low, one.high)
    assert clustered.high - clustered.low > 3 * (naive.high - naive.low)


def test_a_clustered_share_is_as_wide_as_its_prompts_are_few() -> None:
    # Equal samples within a prompt: variance 10/9 * 10 * (20 * .5)^2 / 200^2 = .02778, effective .25 / .02778 = 9.
    flags = [bool(i % 2) for i in range(10) for _ in range(20)]
    prompts = [i for i in range(10) for _ in range(20)]
    clustered, nine = clustered_share(flags, prompts), wilson_interval(4.5, 9)
    assert (clustered.low, clustered.high) == pytest.approx((nine.low, nine.high))
    assert clustered.n == 200
    # Unanimous: the 10 prompts count, not the 200 rows.
    assert clustered_share([False] * 200, prompts).high == pytest.approx(wilson_interval(0, 10).high)
    # One sample a prompt is the plain Wilson interval.
    plain = wilson_interval(5, 10)
    alone = clustered_share([bool(i % 2) for i in range(10)], range(10))
    assert (alone.low, alone.high) == (plain.low, plain.high)


def test_a_single_prompt_says_little_about_a_share() -> None:
    one = clustered_share([True, False, True, False], ["p"] * 4)
    assert one.high - one.low > 0.8


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    # Prompts with risk drawn from Beta(1, 3), mean 0.25, 4 samples each: samples of a prompt go together.
    rng = np.random.default_rng(0)
    prompts = [i for i in range(40) for _ in range(4)]
    hits = {"share": 0, "mean": 0, "naive": 0}
    trials = 200
    for trial in range(trials):
        flags = (rng.random((40, 4)) < rng.beta(1, 3, size=(40, 1))).ravel()
        estimates = {
            "share": clustered_share(flags.tolist(), prompts),
            "mean": bootstrap_mean(flags.astype(float).tolist(), prompts, seed=trial, n_boot=300),
            "naive": wilson_interval(int(flags.sum()), 160),
        }
        for name, estimate in estimates.items():
            hits[name] += estimate.low <= 0.25 <= estimate.high
    # Binomial noise of 200 trials at .95 is .015; three of them below the level.
    assert hits["share"] / trials >= 0.9
    assert hits["mean"] / trials >= 0.9
    assert hits["naive"] < hits["share"]


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [0.1, 0.5, 0.9, 0.2, 0.35, 0.77, 0.04, 0.61]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_a_paired_difference_sees_what_an_unpaired_one_cannot() -> None:
    # Prompts differ by far more than the models do: each falls by exactly 0.1.
    before = [0.1 * i for i in range(1, 10)]
    after = [b - 0.1 for b in before]
    estimate = paired_difference(before, after)
    assert estimate.value == pytest.approx(-0.1)
    assert estimate.low == pytest.approx(-0.1)
    assert estimate.high == pytest.approx(-0.1)


def test_a_paired_difference_weighs_every_prompt_the_same() -> None:
    # Prompt p: three pairs, each +0.3. Prompt q: one pair, -0.1. Mean over prompts (0.3 - 0.1) / 2 = 0.1.
    estimate = paired_difference([0.0, 0.0, 0.0, 0.5, None], [0.3, 0.3, 0.3, 0.4, 0.1], ["p", "p", "p", "q", "q"])
    assert estimate.value == pytest.approx(0.1)
    assert (estimate.n, estimate.unscored) == (2, 1)


def test_unpaired_lengths_are_an_error() -> None:
    with pytest.raises(DataError, match="2 values before and 1 after"):
        paired_difference([0.1, 0.2], [0.1])
    with pytest.raises(DataError, match="2 values and 1 clusters"):
        bootstrap_mean([0.1, 0.2], ["p"])


def test_mcnemar_is_the_sign_test_on_the_changed_pairs() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    # 2 * (1 + 10) / 2^10 for 1 of 10 changed one way.
    assert mcnemar_exact(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar_exact(9, 1) == mcnemar_exact(1, 9)
    assert mcnemar_exact(5, 5) == 1.0
    with pytest.raises(DataError, match="negative"):
        mcnemar_exact(-1, 2)
