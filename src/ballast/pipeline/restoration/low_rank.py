"""The part of lowest rank that holds most of a matrix: exactly, cheaply for thin factors, or with a stated error.

Letters: m, n sides of the matrix; r rank of its factors; k rank that is kept; p columns of the search space.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from ballast.pipeline.restoration.weights import Factors, frobenius

Svd = Literal["auto", "exact", "randomised"]

# Up to this smaller side an exact decomposition takes a fraction of a second.
EXACT_SIDE = 512
_OVERSAMPLE = 10
_TOLERANCE = 1e-5
_BLOCKS = (2, 4, 8, 16, 24)  # after how many blocks the error is looked at


@dataclass(frozen=True)
class LowRank:
    """`u diag(s) v^T`, the leading singular triplets of a matrix.

    Attributes:
        u: (m, k), orthonormal.
        s: (k,), descending.
        v: (n, k), orthonormal.
        energy: share of the squared Frobenius norm that it holds, in [0, 1].
        error: the triplets are exactly those of a matrix that differs from the given one by this share of its
            Frobenius norm (a backward error). 0 where the decomposition is exact up to rounding.
    """

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor
    energy: float
    error: float

    def factors(self) -> Factors:
        """`u diag(s)` and `v^T`."""
        return Factors((self.u * self.s).float(), self.v.T.float())


def truncate(delta: Factors | torch.Tensor, rank: int, svd: Svd = "auto") -> LowRank:
    """The best approximation of a matrix by one of rank k, in the Frobenius norm (Eckart and Young).

    Args:
        delta: (m, n), fp32, or its factors, for which the work is that of an r x r matrix.
        rank: k; more than the matrix has is cut to what it has.
        svd: `auto` decomposes exactly where the smaller side is at most 512, and by a randomised method above.
    """
    if isinstance(delta, Factors):
        return _of_factors(delta, rank)
    side = min(delta.shape)
    if svd == "exact" or (svd == "auto" and side <= EXACT_SIDE) or rank + _OVERSAMPLE >= side:
        return _exact(delta, rank)
    return _randomised(delta, rank)


def _of_factors(delta: Factors, rank: int) -> LowRank:
    # left right = Q_l (R_l R_r^T) Q_r^T, and the middle is only r x r.
    q_l, r_l = torch.linalg.qr(delta.left.double())
    q_r, r_r = torch.linalg.qr(delta.right.double().T)
    middle = _exact(r_l @ r_r.T, rank)
    return LowRank(q_l @ middle.u, middle.s, q_r @ middle.v, middle.energy, 0.0)


def _exact(delta: torch.Tensor, rank: int) -> LowRank:
    # In double precision: where two singular values are close, fp32 would mix their vectors visibly.
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    total = float(s.square().sum())
    k = min(rank, len(s))
    energy = float(s[:k].square().sum()) / total if total else 1.0
    return LowRank(u[:, :k], s[:k], vh[:k].T, energy, 0.0)


def _randomised(delta: torch.Tensor, rank: int) -> LowRank:
    """Block Krylov iteration (Musco and Musco 2015, algorithm 2), until the error is at most 1e-5 or 24 blocks are used.

    The search space is spanned by X, (D D^T) X, (D D^T)^2 X, ... with X = D G for a Gaussian G, which finds the
    leading vectors also where the singular values fall slowly, as those of a full fine-tune do.
    """
    width = rank + _OVERSAMPLE
    gaussian = torch.randn(delta.shape[1], width, generator=torch.Generator().manual_seed(0))
    block = torch.linalg.qr(delta @ gaussian.to(delta)).Q
    basis, images = [block], [block.T @ delta]  # Q_i (m, width), Q_i^T D (width, n)
    norm = frobenius(delta)
    limit = min(max(_BLOCKS), min(delta.shape) // width)
    while True:
        if len(basis) in _BLOCKS or len(basis) >= limit:
            found = _ritz(delta, torch.cat(basis, dim=1), torch.cat(images), rank, norm)
            if found.error <= _TOLERANCE or len(basis) >= limit:
                return found
        block = _orthonormal(delta @ images[-1].T, torch.cat(basis, dim=1))
        basis.append(block)
        images.append(block.T @ delta)


def _orthonormal(block: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """A basis of what is new in the block. Twice, since the first subtraction leaves rounding errors in."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


def _ritz(delta: torch.Tensor, basis_mp: torch.Tensor, image_pn: torch.Tensor, rank: int, norm: float) -> LowRank:
    """The best triplets within the search space, and how far from exact they are.

    D^T u = s v holds by construction and u^T (D v - u s) = 0, so with R = D V - U S the triplets are exact for
    D - R V^T, and ||R||_F is the backward error.
    """
    w, s, vh = torch.linalg.svd(image_pn, full_matrices=False)
    u, s, v = basis_mp @ w[:, :rank], s[:rank], vh[:rank].T
    left = frobenius(delta @ v - u * s)
    energy = float(s.double().square().sum()) / norm**2 if norm else 1.0
    return LowRank(u, s, v, min(energy, 1.0), left / norm if norm else 0.0)
