"""Pass rates from hand-made scores."""

import pytest

from ballast.pipeline.evaluation.judges import Verdict
from ballast.pipeline.evaluation.metrics import summarize
from ballast.pipeline.evaluation.suites import Kind
from ballast.pipeline.evaluation.task_figures import TaskScores, pass_at_k, pass_rate

ORDINARY: frozenset[Kind] = frozenset(("ordinary",))


def verdicts(prompts: str, kind: Kind = "ordinary") -> list[Verdict]:
    return [Verdict(p, kind, i, False, 0.1, False, False, True) for i, p in enumerate(prompts)]


def test_pass_at_k_of_known_counts() -> None:
    # Of 5 answers 2 pass. Drawing 2, none passes in C(3, 2) = 3 of C(5, 2) = 10 draws.
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 4) == 1.0  # only three fail
    assert pass_at_k(5, 0, 5) == 0.0


def test_the_pass_rate_is_a_mean_over_prompts_and_a_prompt_with_too_few_scored_answers_has_none() -> None:
    rows = verdicts("aaabbbccc")
    scores = TaskScores(ORDINARY, 1.0, (1, 0, 0, 0, 0, 0, 1, None, None))
    rate = pass_rate(rows, scores, k=2, seed=0, level=0.95)
    assert rate is not None
    # a: 1 - C(2,2)/C(3,2) = 2/3; b: 0; c has one scored answer.
    assert rate.value == pytest.approx(1 / 3)
    assert (rate.n, rate.unscored) == (2, 1)


def test_prompts_that_all_pass_leave_a_doubt() -> None:
    rate = pass_rate(verdicts("aabbccdd"), TaskScores(ORDINARY, 1.0, (1,) * 8), k=2, seed=0, level=0.95)
    assert rate is not None
    assert rate.value == 1.0
    assert rate.low is not None
    # Wilson of 4 out of 4: 4 / (4 + 1.96^2).
    assert rate.low == pytest.approx(4 / (4 + 1.96**2), abs=1e-3)


def test_a_task_that_gives_shares_has_no_pass_rate() -> None:
    rows = verdicts("aa")
    assert pass_rate(rows, TaskScores(ORDINARY, 1.0, (0.5, 1)), 1, 0, 0.95) is None
    task = {"rouge": TaskScores(ORDINARY, 1.0, (0.5, 1)), "exact": TaskScores(ORDINARY, 1.0, (0, 1))}
    assert list(summarize(rows, task=task, pass_at=(1, 2)).pass_at) == ["exact"]
    assert {k: e.value for k, e in summarize(rows, task=task, pass_at=(1, 2)).pass_at["exact"].items()} == {
        1: 0.5,
        2: 1.0,
    }
