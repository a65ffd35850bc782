"""The arithmetic of NLSR against numpy in float64, which knows the activations themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast.pipeline.restoration.nlsr.algebra import (
    Overlap,
    extrapolate,
    kept_rank,
    largest,
    least_similar,
    output_subspace,
    overlap,
    projected,
    safety_neurons,
    sampled,
    transplant,
)
from ballast.pipeline.restoration.weights import Factors

SHAPES = [(12, 20), (20, 12), (16, 16)]


def numbers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def low_rank_part(change: np.ndarray, x: np.ndarray, rank: int) -> np.ndarray:
    """U U^T D of the singular vectors of D X, as the paper writes it."""
    u = np.linalg.svd(change @ x, full_matrices=False)[0][:, :rank]
    return np.asarray(u @ u.T @ change)


def fp32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).float()


def test_the_reference_lies_beyond_the_aligned_weights() -> None:
    base, aligned = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
    # 2 + 0.9 * (2 - 1) = 2.9
    assert torch.allclose(extrapolate(aligned, aligned - base, 0.9), torch.tensor([[2.9, 2.0]]))
    assert torch.equal(extrapolate(aligned, aligned - base, 0.0), aligned)


def test_the_rank_kept_is_the_share_that_is_not_sparse() -> None:
    assert kept_rank(8, 0.8) == 2  # 1.6
    assert kept_rank(10, 0.8) == 2
    assert kept_rank(64, 0.0) == 64
    assert kept_rank(8, 1.0) == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_the_low_rank_part_is_that_of_the_change_times_activations(shape: tuple[int, int], rank: int) -> None:
    change, x = numbers(*shape, seed=1), numbers(shape[1], 50, seed=2)
    found = projected(fp32(change), output_subspace(fp32(change), torch.from_numpy(x @ x.T), rank)).numpy()
    wanted = low_rank_part(change, x, rank)
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_factors_give_what_their_product_gives(shape: tuple[int, int], rank: int) -> None:
    left, right, x = numbers(shape[0], 4, seed=1), numbers(4, shape[1], seed=2), numbers(shape[1], 50, seed=3)
    factors = Factors(fp32(left), fp32(right))
    moment = torch.from_numpy((right @ x) @ (right @ x).T)  # (4, 4): of the narrow activations alone
    found = projected(factors, output_subspace(factors, moment, rank)).numpy()
    wanted = low_rank_part(left @ right, x, rank)
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_a_rank_beyond_what_there_is_keeps_the_whole_change() -> None:
    left, right, x = numbers(9, 3, seed=1), numbers(3, 7, seed=2), numbers(7, 40, seed=3)
    change = fp32(left @ right).double()
    directions = output_subspace(change, torch.from_numpy(x @ x.T), 100)
    assert directions.shape[1] == 3  # the rank of the change, not 100
    assert torch.allclose(projected(change, directions).double(), change, rtol=1e-5, atol=1e-6)


def test_few_calibration_tokens_limit_the_rank() -> None:
    change, x = numbers(9, 7, seed=1), numbers(7, 2, seed=3)
    assert output_subspace(torch.from_numpy(change), torch.from_numpy(x @ x.T), 5).shape[1] == 2


def test_a_change_of_nothing_has_no_safety_neurons() -> None:
    assert output_subspace(torch.zeros(4, 3), torch.eye(3), 2).shape == (4, 0)
    assert not safety_neurons(torch.zeros(4, 3), torch.eye(3), 2, 0.5).any()


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_mask_holds_the_largest_and_no_zero(values: list[int], share: float) -> None:
    scores = torch.tensor([values], dtype=torch.float32)
    mask = largest(scores, share)
    # As many as the share says, but for entries that are 0.
    assert int(mask.sum()) == min(int(np.floor(share * len(values) + 0.5)), np.count_nonzero(values))
    assert not mask[scores == 0].any()
    if mask.any() and not mask.all():
        assert scores.abs()[mask].min() >= scores.abs()[~mask].max()


def test_of_equal_entries_the_first_are_taken() -> None:
    assert largest(torch.tensor([[1.0, -1.0, 1.0, 1.0]]), 0.5).tolist() == [[True, True, False, False]]


def test_the_mask_is_empty_or_full_at_the_ends_of_sparsity() -> None:
    change = fp32(numbers(6, 5, seed=1))
    assert not safety_neurons(change, torch.eye(5).double(), 5, 1.0).any()
    assert safety_neurons(change, torch.eye(5).double(), 5, 0.0).all()


def test_the_cosine_sees_masked_entries_alone() -> None:
    mask = torch.tensor([[True, True, False]])
    found = overlap(torch.tensor([[3.0, 4.0, 100.0]]), torch.tensor([[4.0, 3.0, -100.0]]), mask)
    assert found.cosine() == pytest.approx(24 / 25)  # (12 + 12) / (5 * 5)
    # Two modules together are one long vector: (24 + 0) / (5 * sqrt(26)) with another ([0], [1]) beside it.
    both = found + Overlap(0.0, 0.0, 1.0)
    assert both.cosine() == pytest.approx(24 / (5 * 26**0.5))


def test_nothing_compared_with_nothing_is_alike_and_something_is_not() -> None:
    assert Overlap(0.0, 0.0, 0.0).cosine() == 1.0
    assert Overlap(0.0, 0.0, 2.0).cosine() == 0.0


def test_the_least_similar_layers_are_chosen() -> None:
    similarity = {"a": 0.9, "b": 0.1, "c": 0.5, "d": 0.1}
    assert least_similar(similarity, 0.5) == ("b", "d")
    assert least_similar(similarity, 0.25) == ("b",)  # of two equal ones the first
    assert least_similar(similarity, 0.0) == ()
    assert least_similar(similarity, 1.0) == ("a", "b", "c", "d")


def test_the_draw_prefers_the_least_similar_and_repeats_with_its_seed() -> None:
    similarity = {"near": 0.9, "middle": 0.5, "far": 0.1}
    draws = [sampled(similarity, 0.5, 0.2, seed) for seed in range(4000)]
    share = {name: sum(name in draw for draw in draws) / len(draws) for name in similarity}
    # By rank 0.3, 0.5 and 0.7; the standard error of 4,000 draws is 0.008.
    assert share == pytest.approx({"near": 0.3, "middle": 0.5, "far": 0.7}, abs=0.035)
    assert sampled(similarity, 0.5, 0.2, 7) == draws[7]
    assert sampled(similarity, 0.9, 0.9, 1)[-1] == "far"  # probability 1.8 counts as 1


def test_a_transplant_takes_masked_entries_and_leaves_every_other_bit() -> None:
    tuned, reference = fp32(numbers(6, 5, seed=1)).bfloat16(), fp32(numbers(6, 5, seed=2))
    mask = fp32(numbers(6, 5, seed=3)) > 0
    patched = transplant(tuned, reference, mask)
    assert patched.dtype == torch.bfloat16
    assert torch.equal(patched[~mask], tuned[~mask])
    assert torch.equal(patched[mask], reference[mask].bfloat16())
    half = transplant(tuned.float(), reference, mask, 0.5)
    assert torch.allclose(half[mask], (tuned.float() + reference)[mask] / 2)
    assert torch.equal(transplant(tuned, reference, mask, 0.0), tuned)
