"""Estimates with intervals for evaluation: shares, means and paired differences, clustered by prompt.

Several samples of one prompt are not independent: a model that complies with a prompt once tends to comply
again. Every interval here is therefore one over prompts, not over completions.

Values may be None or not finite: such a row is unscored. It is left out of the estimate and counted in
`Estimate.unscored`; it is never a 0. An estimate of nothing has the value None.

Shape letters: N rows, C clusters (prompts), B bootstrap resamples.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from scipy import stats

from ballast.errors import DataError


@dataclass(frozen=True)
class Estimate:
    """A value with its interval.

    Attributes:
        value: the estimate; None where no row was scored.
        low: lower end of the interval; None as `value` is.
        high: upper end of the interval; None as `value` is.
        n: rows that were scored.
        unscored: rows that were left out because they have no score.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int = 0


def wilson_interval(successes: float, n: float, level: float = 0.95) -> Estimate:
    """A share with Wilson's score interval (Wilson 1927), which stays sound at 0, at 1 and for small n.

    Args:
        successes: in [0, n]; fractions are allowed, for an effective sample size.
        n: independent trials; 0 gives an estimate without a value.
        level: coverage of the interval, in (0, 1).

    Raises:
        DataError: successes outside [0, n].
    """
    if not 0 <= successes <= n:
        raise DataError(f"a share needs 0 <= successes <= n; got {successes} successes of {n}: check what was counted")
    if n == 0:
        return Estimate(None, None, None, 0)
    z = float(stats.norm.ppf(0.5 + level / 2))
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and 1 an end is the share itself, but for rounding.
    return Estimate(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)), round(n))


def clustered_share(
    flags: Sequence[bool | None], clusters: Sequence[Hashable] | None = None, level: float = 0.95
) -> Estimate:
    """A share of rows with a Wilson interval on the effective sample size of clustered rows.

    The variance of the share between clusters gives the number of independent rows that would be as
    uncertain (Korn and Graubard 1998, with Wilson's interval in place of Clopper and Pearson's). Where all
    rows agree that variance is 0 and says nothing; the rows of a cluster then count as one. So no bootstrap:
    resampling 40 refusals out of 40 would claim certainty.

    Args:
        flags: (N,) None is unscored.
        clusters: (N,) the prompt of each row; None makes every row its own cluster.
        level: coverage of the interval, in (0, 1).
    """
    value, kept, unscored = _scored(flags, clusters)
    if not len(value):
        return Estimate(None, None, None, 0, unscored)
    n, share = len(value), float(value.mean())
    count_C, total_C = _by_cluster(value, kept)
    c = len(count_C)
    if c == n:
        effective = float(n)
    elif 0 < share < 1 and c > 1:
        # Linearised variance of the ratio sum(total) / sum(count) over clusters.
        variance = c / (c - 1) * float(((total_C - share * count_C) ** 2).sum()) / n**2
        effective = min(float(n), max(1.0, share * (1 - share) / variance)) if variance > 0 else float(n)
    else:
        effective = float(c)
    wilson = wilson_interval(share * effective, effective, level)
    return Estimate(share, wilson.low, wilson.high, n, unscored)


def bootstrap_mean(
    values: Sequence[float | None],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    n_boot: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """A mean with a percentile bootstrap interval that resamples clusters.

    Args:
        values: (N,) None and non-finite values are unscored.
        clusters: (N,) the prompt of each row; None makes every row its own cluster. A cluster is drawn with
            all its rows, so the estimate is the plain mean over rows.
        seed: of the resampling; the same seed gives the same interval.
        n_boot: resamples.
        level: coverage of the interval, in (0, 1). With fewer than about 20 clusters the true coverage is lower.
    """
    value, kept, unscored = _scored(values, clusters)
    if not len(value):
        return Estimate(None, None, None, 0, unscored)
    mean_B = _resampled_means((value, kept, unscored), n_boot, np.random.default_rng(seed))
    low, high = np.quantile(mean_B, [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(float(value.mean()), float(low), float(high), len(value), unscored)


def paired_difference(
    before: Sequence[float | None],
    after: Sequence[float | None],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
    n_boot: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """The mean of after - before over prompts, with a bootstrap interval over prompts.

    Rows are paired by position; a pair with an unscored half is unscored. Differences are averaged within a
    prompt first, so that every prompt weighs the same, however many samples were scored.

    Args:
        before: (N,) values of the first model.
        after: (N,) values of the second model, on the same prompts in the same order.
        clusters: (N,) the prompt of each pair; None makes every pair its own prompt.
        seed: of the resampling.
        n_boot: resamples.
        level: coverage of the interval.

    Returns:
        `n` counts prompts with a scored pair, `unscored` counts pairs.

    Raises:
        DataError: the lengths differ.
    """
    if len(before) != len(after):
        raise DataError(f"a paired difference needs pairs; got {len(before)} values before and {len(after)} after")
    difference = [a - b if _finite(a) and _finite(b) else None for b, a in zip(before, after, strict=True)]
    value, kept, unscored = _scored(difference, clusters)
    if not len(value):
        return Estimate(None, None, None, 0, unscored)
    count_C, total_C = _by_cluster(value, kept)
    mean = bootstrap_mean(list(total_C / count_C), None, seed, n_boot, level)
    return Estimate(mean.value, mean.low, mean.high, mean.n, unscored)


def difference_of_means(
    before: Sequence[float | None],
    after: Sequence[float | None],
    clusters_before: Sequence[Hashable],
    clusters_after: Sequence[Hashable],
    seed: int = 0,
    n_boot: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """The mean of `after` minus that of `before`, of two samples that are not paired, with a bootstrap interval.

    The clusters of each sample are resampled by themselves.

    Args:
        before: (N,) values of the first sample; None is unscored.
        after: (M,) values of the second sample.
        clusters_before: (N,) the prompt of each value.
        clusters_after: (M,) the same of the second sample.
        seed: of the resampling.
        n_boot: resamples.
        level: coverage of the interval.

    Returns:
        `n` and `unscored` count the rows of both samples.
    """
    first, second = _scored(before, clusters_before), _scored(after, clusters_after)
    n, unscored = len(first[0]) + len(second[0]), first[2] + second[2]
    if not (len(first[0]) and len(second[0])):
        return Estimate(None, None, None, n, unscored)
    random = np.random.default_rng(seed)
    difference_B = _resampled_means(second, n_boot, random) - _resampled_means(first, n_boot, random)
    low, high = np.quantile(difference_B, [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(float(second[0].mean() - first[0].mean()), float(low), float(high), n, unscored)


def mcnemar_exact(b: int, c: int) -> float:
    """The two-sided p-value of McNemar's exact test on paired verdicts.

    Args:
        b: pairs that changed one way.
        c: pairs that changed the other way.

    Returns:
        P(a split at least this uneven | both ways equally likely); 1 where nothing changed.
    """
    if b < 0 or c < 0:
        raise DataError(f"McNemar's test counts changed pairs; got b = {b}, c = {c}: counts cannot be negative")
    return float(stats.binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0


def _resampled_means(sample: tuple[Any, list[Hashable], int], n_boot: int, random: np.random.Generator) -> Any:
    """(B,) means of resampled clusters."""
    count_C, total_C = _by_cluster(sample[0], sample[1])
    c = len(count_C)
    # Drawing c clusters with replacement is drawing how often each one comes.
    times_BC = random.multinomial(c, np.full(c, 1 / c), size=n_boot)
    return (times_BC @ total_C) / (times_BC @ count_C)


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _scored(values: Sequence[float | None], clusters: Sequence[Hashable] | None) -> tuple[Any, list[Hashable], int]:
    """The scored values (N',), the cluster of each, and how many rows have no score."""
    if clusters is not None and len(clusters) != len(values):
        raise DataError(f"every row needs its cluster; got {len(values)} values and {len(clusters)} clusters")
    scored = [
        (float(v), c)
        for v, c in zip(values, range(len(values)) if clusters is None else clusters, strict=True)
        if _finite(v)
    ]
    return np.array([v for v, _ in scored]), [c for _, c in scored], len(values) - len(scored)


def _by_cluster(value: Any, clusters: Sequence[Hashable]) -> tuple[Any, Any]:
    """Rows and sum of each cluster: two arrays (C,), in the order in which clusters first appear."""
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([number[cluster] for cluster in clusters])
    return np.bincount(index), np.bincount(index, weights=value)
