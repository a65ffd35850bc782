"""Laws of the shaping terms, and the dual variable."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast.rewards.dual import DualVariable
from ballast.rewards.shaping import before, drop, drop_to_go, drops, final, potential, unsafe_from
from ballast.rewards.star import clean_trace

STARS = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=10)
UNIT = st.floats(0, 1, width=32)
ONE = torch.ones(1)


def trace(stars: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    mask_NK = torch.ones(1, len(stars), dtype=torch.bool)
    return clean_trace(torch.tensor([stars]), mask_NK), mask_NK


@settings(deadline=None)  # a busy machine is no failure
@given(STARS, UNIT)
def test_potential_telescopes(stars: list[float], start: float) -> None:
    # A_k - A_{k+1} = m_k - m_{k-1}, the increment of segment k; and A_1 = m_K - s_0, all of them.
    m, mask = trace(stars)
    advantage = potential(m, torch.tensor([start]), mask, ONE, 1.0)[0]
    increments = (m - before(m, torch.tensor([start])))[0]
    torch.testing.assert_close(advantage.flip(0), increments.flip(0).cumsum(0), atol=1e-5, rtol=0)
    assert advantage[0].item() == pytest.approx(m[0, -1].item() - start, abs=1e-6)


@settings(deadline=None)
@given(STARS, UNIT, st.floats(0, 0.5, width=32))
def test_drop_is_never_positive_and_falls_only_where_star_does(stars: list[float], start: float, slack: float) -> None:
    m, mask = trace(stars)
    c = drops(m, torch.tensor([start]), mask, slack)
    rises = before(m, torch.tensor([start])) - m <= slack
    assert (drop(c, ONE, 1.0) <= 0).all()
    assert (c[rises] == 0).all()


@settings(deadline=None)
@given(STARS, UNIT)
def test_drop_to_go_is_charged_to_a_fall_and_all_before_it(stars: list[float], start: float) -> None:
    m, mask = trace(stars)
    c = drops(m, torch.tensor([start]), mask, 0.05)
    to_go = drop_to_go(c, ONE, 1.0)[0]
    assert (to_go <= 0).all()
    assert (to_go[1:] >= to_go[:-1] - 1e-6).all()  # less and less is still to come
    assert to_go[0].item() == pytest.approx(-c.sum().item(), abs=1e-5)


@settings(deadline=None)
@given(STARS)
def test_without_slack_drop_to_go_is_the_distance_to_the_end(stars: list[float]) -> None:
    # m_K - m_{k-1}, where the answer starts no safer than its prompt
    m, mask = trace(stars)
    start = m[:, 0]
    to_go = drop_to_go(drops(m, start, mask, 0.0), ONE, 1.0)
    torch.testing.assert_close(to_go, m[:, -1:] - before(m, start), atol=1e-5, rtol=0)


@settings(deadline=None)
@given(STARS, st.lists(st.just(1.0), min_size=1, max_size=4))
def test_a_late_safe_suffix_undoes_no_charge(stars: list[float], suffix: list[float]) -> None:
    m, mask = trace(stars)
    longer, longer_mask = trace(stars + suffix)
    start = torch.ones(1)
    short, long = drops(m, start, mask, 0.05), drops(longer, start, longer_mask, 0.05)
    # The last segment had no neighbour to be debounced by; every one before it keeps its charge.
    torch.testing.assert_close(long[:, : len(stars) - 1], short[:, :-1])
    # From two low segments in a row on, not even that: the end is as unsafe as before.
    doubled, doubled_mask = trace([*stars, stars[-1]])
    padded, padded_mask = trace([*stars, stars[-1], *suffix])
    torch.testing.assert_close(final(padded, padded_mask), final(doubled, doubled_mask))


@settings(deadline=None)
@given(st.lists(st.floats(0.625, 1, width=32), min_size=0, max_size=6), st.floats(0, 0.375, width=32))
def test_debounce_flags_an_unsafe_last_segment_and_a_lone_one(stars: list[float], low: float) -> None:
    m, mask = trace([*stars, low])
    unsafe = unsafe_from(m, mask, 0.5)[0].tolist()
    assert unsafe == [False] * len(stars) + [True]


@settings(deadline=None)
@given(st.lists(st.floats(0.625, 1, width=32), min_size=1, max_size=5), st.floats(0, 0.375, width=32))
def test_one_low_segment_in_the_middle_is_no_violation(stars: list[float], low: float) -> None:
    m, mask = trace([*stars, low, *stars])
    assert not unsafe_from(m, mask, 0.5).any()


def test_unsafe_goes_on_to_the_rows_end_and_not_beyond() -> None:
    # Without cleaning, a later safe segment is still after the first unsafe one.
    star_NK = torch.tensor([[0.9, 0.2, 0.9, 0.0]])
    assert unsafe_from(star_NK, torch.tensor([[True, True, True, False]]), 0.5).tolist() == [[False, True, True, False]]


def test_the_dual_variable_follows_the_average_excess() -> None:
    # first share .5: average .5, 1 + .05 * (.5 - .1) = 1.02; then 0: average .9 * .5 = .45, 1.02 + .05 * .35 = 1.0375
    dual = DualVariable(1.0).updated(0.5, target=0.1)
    assert (dual.value, dual.rate) == (pytest.approx(1.02), 0.5)
    dual = dual.updated(0.0, target=0.1)
    assert (dual.value, dual.rate) == (pytest.approx(1.0375), pytest.approx(0.45))


def test_the_dual_variable_stays_between_zero_and_its_maximum() -> None:
    assert DualVariable(0.001).updated(0.0, target=1.0).value == 0.0
    assert DualVariable(9.99).updated(1.0, target=0.0).value == 10.0
