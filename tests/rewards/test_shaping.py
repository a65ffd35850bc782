"""Shaping and group statistics, by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ballast.rewards.advantages import charged, group_std, group_zscore, weighted_zscores
from ballast.rewards.shaping import drop, drops, gate, group_scale

ALL = torch.ones(4, dtype=torch.bool)


def test_a_fall_is_charged_to_its_segment_less_the_slack() -> None:
    # s_0 .9 -> m .9 .85 .35: falls 0, .05, .5; less the slack .05: 0, 0, .45
    c = drops(torch.tensor([[0.9, 0.85, 0.35]]), torch.tensor([0.9]), torch.ones(1, 3, dtype=torch.bool), 0.05)
    torch.testing.assert_close(c, torch.tensor([[0.0, 0.0, 0.45]]))


def test_a_risky_prompt_is_no_fall_of_the_answers() -> None:
    c = drops(torch.tensor([[0.6, 0.6]]), torch.tensor([0.2]), torch.ones(1, 2, dtype=torch.bool), 0.05)
    assert c.tolist() == [[0.0, 0.0]]


def test_segments_beyond_the_end_have_no_fall() -> None:
    mask = torch.tensor([[True, False]])
    assert drops(torch.tensor([[0.9, 0.0]]), torch.tensor([0.9]), mask, 0.05).tolist() == [[0.0, 0.0]]


def test_drop_is_scaled_by_the_groups_spread_and_not_centred() -> None:
    # sums .4, 0, 0, 0: mean .1, variance (.09 + 3 * .01) / 3 = .04, std .2; A = -1 * .4 / .2 = -2, the others 0
    total = torch.tensor([0.4, 0.0, 0.0, 0.0])
    scale = group_scale(total, ALL, 4, std_floor=0.1)
    torch.testing.assert_close(drop(total[:, None], scale, 1.0)[:, 0], torch.tensor([-2.0, 0, 0, 0]))


def test_the_floor_keeps_a_small_spread_from_becoming_a_strong_signal() -> None:
    total = torch.tensor([0.01, 0.0, 0.0, 0.0])  # std .005, floored at .1: -.1
    scale = group_scale(total, ALL, 4, std_floor=0.1)
    assert drop(total[:, None], scale, 1.0)[0, 0].item() == pytest.approx(-0.1)


@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), st.floats(0, 5))
def test_drop_never_praises(values: list[float], weight: float) -> None:
    total = torch.tensor(values)
    assert (drop(total[:, None], group_scale(total, ALL, 4, 0.1), weight) <= 0).all()


def test_gate_lets_praise_through_only_as_far_as_the_text_is_safe() -> None:
    # Four compliers (R 1, s .1) and four refusers (R 0, s .95), tau 0: Z = +-.5 / .5345 = +-.9354.
    z = group_zscore(torch.tensor([1.0] * 4 + [0.0] * 4), torch.ones(8, dtype=torch.bool), 8, 0.1)
    clean = torch.tensor([[0.1]] * 4 + [[0.95]] * 4)
    advantage = gate(z[:, None], clean, tau=0.0)[:, 0]
    torch.testing.assert_close(advantage, torch.tensor([0.0935] * 4 + [-0.9354] * 4), atol=1e-4, rtol=0)


def test_gate_above_tau_is_linear_and_at_tau_shut() -> None:
    # tau .5: m .5 -> 0, m .75 -> .5, m 1 -> 1
    assert gate(torch.tensor([[2.0]]), torch.tensor([[1.0, 0.75, 0.5, 0.2]]), 0.5).tolist() == [[2.0, 1.0, 0.0, 0.0]]


def test_blame_is_not_gated() -> None:
    assert gate(torch.tensor([[-2.0]]), torch.tensor([[1.0, 0.0]]), 0.5).tolist() == [[-2.0, -2.0]]


def test_zscore_uses_the_sample_deviation_of_its_own_group() -> None:
    # group 1: 0, 1 -> std .7071 -> -+.7071; group 2: 5, 5 -> 0
    z = group_zscore(torch.tensor([0.0, 1.0, 5.0, 5.0]), ALL, 2, 0.1)
    torch.testing.assert_close(z, torch.tensor([-0.7071, 0.7071, 0.0, 0.0]), atol=1e-4, rtol=0)


def test_unscored_completion_leaves_the_baseline_alone() -> None:
    value, scored = torch.tensor([0.0, 1.0, 0.5, 100.0]), torch.tensor([True, True, True, False])
    alone = group_zscore(torch.tensor([0.0, 1.0, 0.5]), torch.ones(3, dtype=torch.bool), 3, 0.1)
    together = group_zscore(value, scored, 4, 0.1)
    torch.testing.assert_close(together[:3], alone)
    assert together[3] == 0


@given(
    st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
    st.floats(-50, 50, width=32),
)
def test_what_an_unscored_row_holds_changes_no_other_row(values: list[float], scored: list[bool], noise: float) -> None:
    scored_N = torch.tensor(scored)
    clean = torch.tensor(values)
    noisy = torch.where(scored_N, clean, torch.tensor(noise))
    torch.testing.assert_close(group_zscore(noisy, scored_N, 4, 0.1), group_zscore(clean, scored_N, 4, 0.1))


def test_a_group_with_fewer_than_two_scored_rows_gets_zero() -> None:
    z = group_zscore(torch.tensor([0.0, 1.0, 0.5, 0.9]), torch.tensor([True, False, False, False]), 4, 0.1)
    assert z.tolist() == [0.0] * 4


def test_a_term_that_does_not_apply_counts_zero_and_leaves_the_other_terms() -> None:
    nan = float("nan")
    reward = torch.tensor([[nan, 1.0], [nan, 0.0]])
    total = weighted_zscores(reward, torch.tensor([1.0, 1.0]), torch.ones(2, dtype=torch.bool), 2, 0.1).sum(1)
    torch.testing.assert_close(total, torch.tensor([0.7071, -0.7071]), atol=1e-4, rtol=0)


def test_terms_are_normalised_before_they_are_added() -> None:
    # The second term is the first one times 100: after normalising, both weigh the same, so the sum is twice one.
    reward = torch.tensor([[0.0, 0.0], [1.0, 100.0]])
    total = weighted_zscores(reward, torch.tensor([1.0, 1.0]), torch.ones(2, dtype=torch.bool), 2, 0.1).sum(1)
    torch.testing.assert_close(total, torch.tensor([-1.4142, 1.4142]), atol=1e-4, rtol=0)


def test_spread_of_a_group_without_scored_rows_is_zero() -> None:
    assert group_std(torch.tensor([1.0, 5.0]), torch.tensor([False, False]), 2).tolist() == [0.0, 0.0]


def test_a_term_over_the_batch_still_presses_on_a_group_of_equals() -> None:
    # Groups of 2: one refuses an ordinary prompt as a whole (-1, -1), one answers (1, 1). Each group alone has
    # nothing to compare; over the batch mean 0 and standard deviation sqrt(4/3) = 1.1547, so -+1/1.1547 = -+0.866.
    reward = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]])
    one, scored = torch.tensor([1.0]), torch.ones(4, dtype=torch.bool)
    assert weighted_zscores(reward, one, scored, 2, 0.1)[:, 0].tolist() == [0.0] * 4
    total = weighted_zscores(reward, one, scored, 2, 0.1, over_batch=[0])[:, 0]
    torch.testing.assert_close(total, torch.tensor([-0.8660, -0.8660, 0.8660, 0.8660]), atol=1e-4, rtol=0)


def test_a_term_of_the_opening_is_charged_there_and_nowhere_else() -> None:
    # Terms 1 and 10 over three segments, the second charged to the first two: 11, 11, 1.
    z = torch.tensor([[1.0, 10.0], [-1.0, 0.0]])
    assert charged(z, 3, {1: 2}).tolist() == [[11.0, 11.0, 1.0], [-1.0, -1.0, -1.0]]


def test_an_opening_longer_than_the_answer_charges_the_whole_answer() -> None:
    z = torch.tensor([[1.0, 10.0]])
    assert charged(z, 2, {1: 5}).tolist() == charged(z, 2).tolist() == [[11.0, 11.0]]
