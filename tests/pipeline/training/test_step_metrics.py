"""What a training step is logged by."""

import math

import pytest
import torch

from ballast.pipeline.training.step_metrics import group_metrics, reward_metrics, row_mean

NAN = float("nan")


def test_rewards_are_means_over_scored_rows_that_a_term_applies_to() -> None:
    reward_NR = torch.tensor([[0.8, 0.4], [NAN, 0.6], [NAN, 0.0]])
    scored_N = torch.tensor([True, True, False])  # the third row's 0.0 counts nowhere
    values = reward_metrics(["star", "refusal"], reward_NR, torch.tensor([1.0, 3.0]), scored_N)
    assert values["reward/star"] == pytest.approx(0.8)
    assert values["reward/refusal"] == pytest.approx(0.5)  # (0.4 + 0.6) / 2
    # row 0: (1 * 0.8 + 3 * 0.4) / 4 = 0.5; row 1: 3 * 0.6 / 3 = 0.6
    assert values["reward/total"] == pytest.approx(0.55)


def test_nothing_scored_is_nan_and_not_zero() -> None:
    scored_N = torch.tensor([False, False])
    values = reward_metrics(["star"], torch.tensor([[0.5], [NAN]]), torch.tensor([1.0]), scored_N)
    values |= group_metrics(torch.zeros(2), scored_N, 2)
    assert set(values) == {"reward/star", "reward/total", "advantage/group_mean_min", "advantage/group_mean_max"}
    assert all(math.isnan(value) for value in values.values())


def test_group_means_are_over_scored_rows_and_skip_groups_without_any() -> None:
    advantage_NT = torch.tensor([[1.0, 3.0], [-4.0, 0.0], [-1.0, -1.0], [9.0, 9.0], [0.0, 0.0], [0.0, 0.0]])
    segment_NT = torch.tensor([[0, 1], [0, -1], [0, 0], [0, 0], [0, 0], [0, 0]])
    mean_N = row_mean(advantage_NT, segment_NT)
    assert mean_N.tolist() == [2.0, -4.0, -1.0, 9.0, 0.0, 0.0]
    # groups of 2: (2 - 4) / 2 = -1; the second's 9 is unscored, so -1 alone; the third has no scored row
    scored_N = torch.tensor([True, True, True, False, False, False])
    mean_N[2] = 0.5
    values = group_metrics(mean_N, scored_N, 2)
    assert values == {"advantage/group_mean_min": -1.0, "advantage/group_mean_max": 0.5}
