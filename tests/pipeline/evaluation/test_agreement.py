"""Two judges of the same answers: known tables, and what takes no part in them."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.errors import DataError
from ballast.pipeline.evaluation.agreement import agreement, agreements, cohens_kappa
from ballast.pipeline.evaluation.judges import Verdict
from ballast.pipeline.evaluation.metrics import EvaluationSummary, compare, summarize

COUNTS = st.integers(0, 50)


def test_kappa_of_a_known_table() -> None:
    # 50 answers. Observed agreement (20 + 15) / 50 = .7. Unsafe shares 25/50 and 30/50, so chance agrees on
    # .5 x .6 + .5 x .4 = .5, and kappa is (.7 - .5) / (1 - .5).
    assert cohens_kappa(20, 5, 10, 15) == pytest.approx(0.4)
    assert cohens_kappa(30, 0, 0, 20) == 1.0
    # Each calls half unsafe, and they never agree.
    assert cohens_kappa(0, 10, 10, 0) == -1.0


def test_kappa_is_not_there_where_chance_would_agree_on_everything() -> None:
    assert cohens_kappa(0, 0, 0, 0) is None
    assert cohens_kappa(40, 0, 0, 0) is None
    assert cohens_kappa(0, 0, 0, 40) is None


@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_kappa_does_not_change_when_the_judges_or_the_labels_change_places(a: int, b: int, c: int, d: int) -> None:
    kappa = cohens_kappa(a, b, c, d)
    assert kappa == (None if kappa is None else pytest.approx(cohens_kappa(a, c, b, d)))
    assert kappa == (None if kappa is None else pytest.approx(cohens_kappa(d, b, c, a)))
    assert kappa is None or -1.0 - 1e-9 <= kappa <= 1.0 + 1e-9


def test_answers_that_one_judge_could_not_score_take_no_part() -> None:
    first = [True, True, False, False, True, None]
    second = [True, False, True, False, None, True]
    found = agreement(first, second, [True, False, True, True, True, True], list("abcdef"))
    assert (found.both_unsafe, found.only_first, found.only_second, found.both_safe) == (1, 1, 1, 1)
    # Of the four that both scored they disagree on two, one of which is not readable.
    assert (found.disagreement.value, found.disagreement.n, found.disagreement.unscored) == (0.5, 4, 2)
    assert found.incoherent == 1
    with pytest.raises(DataError, match="got 1 and 2, 1 flags and 1 prompts"):
        agreement([True], [True, False], [True], ["a"])


def verdict(prompt_id: str, unsafe: bool | None, second: bool | None, refused: bool, kind: str = "harmful") -> Verdict:
    def risk(flag: bool | None) -> float | None:
        return None if flag is None else float(flag)

    base = Verdict(prompt_id, kind, 0, False, risk(unsafe), unsafe, refused, True)  # type: ignore[arg-type]
    return replace(base, second_risk=risk(second), second_unsafe=second)


VERDICTS = [
    verdict("a", True, True, False),
    verdict("b", True, False, False),
    verdict("c", False, False, True),
    verdict("d", False, True, False),
    verdict("e", True, True, True, kind="ordinary"),  # not a harmful prompt
]


def test_every_pair_of_judges_is_compared_on_the_harmful_prompts() -> None:
    found = agreements(VERDICTS, [0.9, 0.9, 0.5, 0.1, 0.9], 0.5, 0.95)
    pairs = {pair: (a.both_unsafe, a.only_first, a.only_second, a.both_safe) for pair, a in found.items()}
    assert pairs == {
        # Not refused are a, b and d.
        "judge, keywords": (2, 0, 1, 1),
        # The guard's risk at the threshold counts: a, b and c.
        "judge, guard": (2, 0, 1, 1),
        "judge, second judge": (1, 1, 1, 1),
        "second judge, keywords": (2, 0, 1, 1),
    }
    without = agreements([replace(v, second_risk=None, second_unsafe=None) for v in VERDICTS], None, 0.5, 0.95)
    assert list(without) == ["judge, keywords"]


def test_a_summary_holds_both_judges_and_is_read_back_equal() -> None:
    summary = summarize(VERDICTS)
    assert summary.unsafe_share.value == 0.5
    assert summary.second_unsafe_share is not None
    assert summary.second_unsafe_share.value == 0.5
    assert summary.agreement["judge, second judge"].disagreement.value == 0.5
    assert EvaluationSummary.from_json(summary.to_json()) == summary


def test_a_summary_without_a_second_judge_has_no_figure_of_it() -> None:
    summary = summarize([replace(v, second_risk=None, second_unsafe=None) for v in VERDICTS])
    assert summary.second_unsafe_share is None
    assert summary.second_risk is None


def test_two_models_are_compared_by_the_second_judge_too() -> None:
    safe = [replace(v, second_unsafe=False, second_risk=0.0) for v in VERDICTS]
    comparison = compare(VERDICTS, safe)
    # By the judge nothing changed; by the second judge a and d became safe: McNemar 2 x .5^2 = .5.
    assert comparison.p_value == 1.0
    assert comparison.second_p_value == 0.5
    assert comparison.second_unsafe_share is not None
    assert comparison.second_unsafe_share.value == -0.5
    unjudged = [replace(v, second_unsafe=None, second_risk=None) for v in VERDICTS]
    assert compare(VERDICTS, unjudged).second_p_value is None
