"""STAR: padding of risk traces, cleaning, spreading to tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ballast.guardrails.types import RiskTrace
from ballast.rewards.star import clean_trace, pad_segments, segment_scores, spread_to_tokens


def row(*values: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([values]), torch.ones(1, len(values), dtype=torch.bool)


def test_star_is_one_minus_risk_and_the_empty_response_is_kept_apart() -> None:
    scores = segment_scores([RiskTrace((0, 5, 9), (0.2, 0.1, 0.7)), RiskTrace((0, 4), (0.5, 0.5))])
    torch.testing.assert_close(scores.start_N, torch.tensor([0.8, 0.5]))
    torch.testing.assert_close(scores.star_NK, torch.tensor([[0.9, 0.3], [0.5, 0.0]]))
    assert scores.segment_mask_NK.tolist() == [[True, True], [True, False]]


def test_an_unscored_cut_makes_the_row_unscored_and_costs_the_others_nothing() -> None:
    scores = segment_scores([RiskTrace((0, 5), (0.2, None), reason="server down"), RiskTrace((0, 4), (0.5, 0.25))])
    assert scores.scored_N.tolist() == [False, True]
    assert scores.star_NK[1, 0].item() == 0.75


def test_an_empty_response_counts_as_one_segment_with_the_prompts_star() -> None:
    scores = segment_scores([RiskTrace((0,), (0.4,))])
    assert scores.star_NK.shape == (1, 1)
    assert scores.star_NK[0, 0].item() == pytest.approx(0.6)


def test_a_trace_without_the_empty_response_is_refused() -> None:
    with pytest.raises(ValueError, match="cut 0"):
        segment_scores([RiskTrace((5, 9), (0.2, 0.1))])


def test_one_low_segment_alone_does_not_count() -> None:
    # s~ = .9, max(.9,.1)=.9, max(.1,.9)=.9, last keeps .8 -> running minimum .9 .9 .9 .8
    torch.testing.assert_close(clean_trace(*row(0.9, 0.1, 0.9, 0.8)), torch.tensor([[0.9, 0.9, 0.9, 0.8]]))


def test_two_low_segments_in_a_row_count_from_the_second() -> None:
    # s~ = .9, .9, max(.1,.2)=.2, max(.2,.9)=.9, .9 -> minimum .9 .9 .2 .2 .2
    torch.testing.assert_close(clean_trace(*row(0.9, 0.1, 0.2, 0.9, 0.9)), torch.tensor([[0.9, 0.9, 0.2, 0.2, 0.2]]))


def test_an_unsafe_last_segment_counts_at_once() -> None:
    torch.testing.assert_close(clean_trace(*row(0.9, 0.9, 0.1)), torch.tensor([[0.9, 0.9, 0.1]]))


def test_a_lone_segment_keeps_its_score() -> None:
    torch.testing.assert_close(clean_trace(*row(0.3)), torch.tensor([[0.3]]))


def test_the_last_segment_of_each_row_is_its_own_last_not_the_batchs() -> None:
    star = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.9, 0.9]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert clean_trace(star, mask)[0, 1].item() == pytest.approx(0.1)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12), st.floats(0, 1, width=32))
def test_a_late_safe_suffix_changes_nothing_before_it_and_never_raises_star(values: list[float], suffix: float) -> None:
    clean = clean_trace(*row(*values))[0]
    longer = clean_trace(*row(*values, 1.0, 1.0))[0]
    assert bool((clean[1:] <= clean[:-1]).all())
    # Only the former last segment may be debounced now: no longer last, it needs a low neighbour.
    torch.testing.assert_close(longer[: len(values) - 1], clean[:-1])
    assert longer[-1] <= longer[0]


def test_values_are_spread_by_segment_and_padding_gets_zero() -> None:
    segment_NT = pad_segments([[0, 0, 1], [0]], width=4)
    assert segment_NT.tolist() == [[0, 0, 1, -1], [0, -1, -1, -1]]
    value = spread_to_tokens(torch.tensor([[0.5, -1.0], [2.0, 9.0]]), segment_NT)
    assert value.tolist() == [[0.5, 0.5, -1.0, 0.0], [2.0, 0.0, 0.0, 0.0]]
