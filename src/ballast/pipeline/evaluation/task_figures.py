"""Figures of task rewards: the mean of each, and the pass rate where several answers to a prompt were sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

from ballast.pipeline.evaluation.judges import Verdict
from ballast.pipeline.evaluation.statistics import Estimate, bootstrap_mean, clustered_share
from ballast.pipeline.evaluation.suites import Kind


@dataclass(frozen=True)
class TaskScores:
    """What one entry of `rewards.task` gives a model's answers.

    Attributes:
        kinds: kinds of prompts that the task applies to.
        weight: its share in the reward.
        values: (N,) one an answer; None where the task does not apply, or where the data has no answer to compare with.
    """

    kinds: frozenset[Kind]
    weight: float
    values: tuple[float | None, ...]

    @property
    def passes(self) -> bool:
        """Whether every value is a pass (1) or a failure (0)."""
        return all(value in (0, 1, None) for value in self.values)


def task_mean(verdicts: Sequence[Verdict], scores: TaskScores, seed: int, level: float) -> Estimate:
    """The mean over the answers to prompts of the task's kinds; a share where its values are 0 and 1."""
    rows = _of_kinds(verdicts, scores)
    prompts, values = [prompt for prompt, _ in rows], [value for _, value in rows]
    if scores.passes:  # a share: resampling equal rows would claim certainty
        return clustered_share([None if value is None else bool(value) for value in values], prompts, level)
    return bootstrap_mean(values, prompts, seed, level=level)


def pass_rate(verdicts: Sequence[Verdict], scores: TaskScores, k: int, seed: int, level: float) -> Estimate | None:
    """The chance that at least one of k answers to a prompt passes, estimated from all of its n answers.

    For a prompt of n answers of which c pass, 1 - C(n - c, k) / C(n, k), without bias (Chen et al. 2021, arXiv
    2107.03374, eq. 1); the mean over prompts. A prompt with fewer than k scored answers is unscored.

    Args:
        verdicts: (N,) the answers, whose prompts and kinds they name.
        scores: of the task.
        k: at least 1.
        seed: of the bootstrap over prompts.
        level: coverage of the interval.

    Returns:
        None for a task whose values are not passes and failures.
    """
    if not scores.passes:
        return None
    passed: dict[str, list[bool]] = {}
    for prompt, value in _of_kinds(verdicts, scores):
        answers = passed.setdefault(prompt, [])
        if value is not None:
            answers.append(bool(value))
    rates = [pass_at_k(len(answers), sum(answers), k) if len(answers) >= k else None for answers in passed.values()]
    if all(rate in (0, 1, None) for rate in rates):
        return clustered_share([None if rate is None else bool(rate) for rate in rates], None, level)
    return bootstrap_mean(rates, None, seed, level=level)


def pass_rates(
    verdicts: Sequence[Verdict], tasks: Mapping[str, TaskScores], ks: Sequence[int], seed: int, level: float
) -> dict[str, dict[int, Estimate]]:
    """By task and k, the pass rates of the tasks that have one; see `pass_rate`."""
    found = {
        name: {k: rate for k in ks if (rate := pass_rate(verdicts, scores, k, seed, level)) is not None}
        for name, scores in tasks.items()
    }
    return {name: rates for name, rates in found.items() if rates}


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n answers, drawn without putting back, hold one of the c that pass."""
    return 1.0 - comb(n - c, k) / comb(n, k)


def _of_kinds(verdicts: Sequence[Verdict], scores: TaskScores) -> list[tuple[str, float | None]]:
    return [(v.prompt_id, value) for v, value in zip(verdicts, scores.values, strict=True) if v.kind in scores.kinds]
