"""The arithmetic of neuron-level safety realignment (Yi et al. 2024, NLSR, arXiv 2412.12497): tensors in, tensors out.

    m outputs, n inputs of a linear module; its weight is (m, n)   r rank of a change   k rank that is kept
    base W_0, aligned W_a, tuned W_t, super-aligned W_e = W_a + beta (W_a - W_0); a change is a weight minus W_0

Changes rather than weights are compared: of two fine-tuned models the weights are alike in every module, and only
their changes tell where they went.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ballast.pipeline.restoration.weights import Factors

Delta: TypeAlias = Factors | torch.Tensor


def extrapolate(aligned: torch.Tensor, change: Delta, beta: float) -> torch.Tensor:
    """`W_e = W_a + beta (W_a - W_0)`, (m, n) fp32; exactly W_a where `beta` is 0.

    Args:
        aligned: W_a, (m, n).
        change: W_a - W_0, (m, n).
        beta: how far beyond the aligned weights.
    """
    if not beta:
        return aligned.float().clone()
    if isinstance(change, Factors):
        return torch.addmm(aligned.float(), change.left, change.right, alpha=beta)
    return torch.add(aligned.float(), change, alpha=beta)


def kept_rank(rank: int, sparsity: float) -> int:
    """`r (1 - P_SR)`, rounded, at least 1."""
    return max(1, math.floor(rank * (1.0 - sparsity) + 0.5))


def output_subspace(change: Delta, second_moment: torch.Tensor, rank: int) -> torch.Tensor:
    """The directions of a module's output in which its change says most: U of `D X ~ U S V^T`.

    X is never needed, only its second moment: the left singular vectors of `D X` are the eigenvectors of
    `D X X^T D^T`. With a QR of D they are found in its smaller dimension, in fp64.

    Args:
        change: D, (m, n).
        second_moment: `X X^T`, (n, n); for Factors that of `right @ X`, (r, r).
        rank: how many directions are wanted.

    Returns:
        (m, k) fp64 with orthonormal columns; k is smaller than `rank` where `D X` has no more directions.
    """
    left = (change.left if isinstance(change, Factors) else change).double()
    frame, core = torch.linalg.qr(left) if left.shape[0] > left.shape[1] else (None, left)
    values, vectors = torch.linalg.eigh(core @ second_moment.double() @ core.T)
    values, vectors = values.flip(0), vectors.flip(1)
    # Below this an eigenvalue is rounding.
    floor = values.new_tensor(max(left.shape)) * torch.finfo(values.dtype).eps * values.clamp(min=0)[:1].sum()
    kept = vectors[:, : min(rank, int((values > floor).sum()))]
    return kept if frame is None else frame @ kept


def projected(change: Delta, directions: torch.Tensor) -> torch.Tensor:
    """`U U^T D`, (m, n) fp32: the change as far as it acts along `directions`."""
    if isinstance(change, Factors):
        right = directions.T @ change.left.double() @ change.right.double()
    else:
        right = directions.T @ change.double()
    return (directions @ right).float()


def largest(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Bool (m, n): the `share` of entries with the largest magnitude, of equal ones the first.

    An entry of 0 is never among them, so there may be fewer.
    """
    magnitude = scores.abs().flatten()
    wanted = min(math.floor(share * magnitude.numel() + 0.5), int(torch.count_nonzero(magnitude)))
    if not wanted:
        return torch.zeros_like(scores, dtype=torch.bool)
    smallest = magnitude.kthvalue(magnitude.numel() - wanted + 1).values
    mask = magnitude > smallest
    mask[(magnitude == smallest).nonzero()[: wanted - int(mask.sum()), 0]] = True
    return mask.reshape(scores.shape)


def safety_neurons(change: Delta, second_moment: torch.Tensor, rank: int, sparsity: float) -> torch.Tensor:
    """The mask of a module: where the low-rank part of the alignment's change is largest.

    W_e - W_0 is `(1 + beta)` times W_a - W_0, so both have the same mask.

    Args:
        change: W_a - W_0, (m, n).
        second_moment: of the module's inputs on calibration rows, see `output_subspace`.
        rank: r, of which `kept_rank(r, sparsity)` directions are kept.
        sparsity: P_SR; the mask holds the share `1 - P_SR` of the entries.

    Returns:
        Bool, (m, n).
    """
    directions = output_subspace(change, second_moment, kept_rank(rank, sparsity))
    return largest(projected(change, directions), 1.0 - sparsity)


@dataclass(frozen=True)
class Overlap:
    """Three sums over masked entries, from which cosines of one module or of several together are made."""

    product: float
    tuned: float
    reference: float

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.product + other.product, self.tuned + other.tuned, self.reference + other.reference)

    def cosine(self) -> float:
        """In [-1, 1]; 1 where both are 0 (nothing to restore), 0 where one is."""
        if not self.tuned or not self.reference:
            return 0.0 if self.tuned or self.reference else 1.0
        return max(-1.0, min(1.0, self.product / math.sqrt(self.tuned) / math.sqrt(self.reference)))


def overlap(tuned: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> Overlap:
    """Of two changes (m, n) under the mask, summed in fp64."""
    one, other = tuned[mask].double(), reference[mask].double()
    return Overlap(float(one @ other), float(one @ one), float(other @ other))


def least_similar(similarity: Mapping[str, float], share: float) -> tuple[str, ...]:
    """The `share` of layers with the smallest similarity, of equal ones the first; in the order given."""
    count = math.floor(share * len(similarity) + 0.5)
    chosen = set(sorted(similarity, key=lambda name: similarity[name])[:count])
    return tuple(name for name in similarity if name in chosen)


def sampled(similarity: Mapping[str, float], share: float, spread: float, seed: int) -> tuple[str, ...]:
    """Layers drawn one by one, a less similar one with a higher probability (the paper's choice).

    The probability goes in even steps, by rank, from `share - spread` of the most similar layer to `share + spread` of
    the least similar one, cut to [0, 1]; a layer alone has `share`.
    """
    order: Sequence[str] = sorted(similarity, key=lambda name: -similarity[name])
    place = {name: (2.0 * i / (len(order) - 1) - 1.0 if len(order) > 1 else 0.0) for i, name in enumerate(order)}
    generator = random.Random(seed)
    return tuple(name for name in similarity if generator.random() < share + spread * place[name])


def transplant(tuned: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """The tuned weight with the reference's entries under the mask.

    Args:
        tuned: (m, n), W_t; it is not written into.
        reference: (m, n), W_e in fp32.
        mask: bool, (m, n).
        strength: how far a masked entry goes from W_t to W_e; 1 is the paper's transplant, 0 changes nothing.

    Returns:
        (m, n) of the dtype of `tuned`; outside the mask the same bits.
    """
    patched = tuned.clone()
    if strength:
        goal = reference[mask]
        if strength != 1.0:
            start = tuned[mask].float()
            goal = start + strength * (goal - start)
        patched[mask] = goal.to(tuned.dtype)
    return patched
