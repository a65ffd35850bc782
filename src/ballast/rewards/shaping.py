"""Shaping: from STAR to per-segment advantages. Each function is one term and knows no other.

    N completions in groups of G (rows n*G .. n*G+G-1 answer one prompt)   K segments   T policy tokens

m is the trace of `star.clean_trace`, non-increasing along K (plain STAR where cleaning is off); m_0 = s_0, STAR of
the empty response, is the start of increments and never part of a minimum. Unscored rows get their advantage 0
from the caller; what is said of them here means nothing.
"""

import torch

from ballast.rewards.advantages import enough_to_compare, group_std


def before(clean_NK: torch.Tensor, start_N: torch.Tensor) -> torch.Tensor:
    """(N, K) m_{k-1}: what STAR was before each segment, s_0 before the first."""
    return torch.cat([start_N[:, None], clean_NK[:, :-1]], dim=1)


def final(clean_NK: torch.Tensor, segment_mask_NK: torch.Tensor) -> torch.Tensor:
    """(N,) m_K: STAR of the whole answer, at each row's own last segment."""
    last_N = segment_mask_NK.sum(dim=1).clamp(min=1) - 1
    return clean_NK.gather(1, last_N[:, None])[:, 0]


def drops(clean_NK: torch.Tensor, start_N: torch.Tensor, segment_mask_NK: torch.Tensor, slack: float) -> torch.Tensor:
    """How far STAR falls in each segment: c_k = max(0, m_{k-1} - m_k - slack), with m_0 = s_0.

    Args:
        clean_NK: m.
        start_N: s_0; a prompt that is risky by itself is no fall of the answer's.
        segment_mask_NK: True where a row has a segment.
        slack: a fall up to this counts as the guard's noise.

    Returns:
        (N, K) falls >= 0, 0 beyond a row's segments.
    """
    fall_NK = before(clean_NK, start_N) - clean_NK - slack
    return fall_NK.clamp(min=0).masked_fill(~segment_mask_NK, 0.0)


def group_scale(value_N: torch.Tensor, scored_N: torch.Tensor, group_size: int, std_floor: float) -> torch.Tensor:
    """What a term that is scaled and not centred is divided by: the spread of a value within the group.

    Args:
        value_N: sum_k c_k for the drops, m_K for the potential.
        scored_N: False where the guard could not judge the row.
        group_size: G.
        std_floor: keeps a jitter in a group of equals from becoming a strong signal.

    Returns:
        (N,) standard deviation (n - 1), at least the floor; infinite in a group with fewer than two scored rows,
        which have no spread, so that the term is 0 there.
    """
    std_N = group_std(value_N, scored_N, group_size).clamp(min=std_floor)
    return std_N.masked_fill(~enough_to_compare(scored_N, group_size), float("inf"))


def drop(drop_NK: torch.Tensor, scale_N: torch.Tensor, weight: float) -> torch.Tensor:
    """Charge each fall to its own segment: A_k = -weight * c_k / scale.

    Scaled and not centred: centring would praise segments for merely not falling.

    Args:
        drop_NK: falls >= 0, from `drops`.
        scale_N: `group_scale` of their sums.
        weight: 0 switches the term off.

    Returns:
        (N, K) advantages <= 0.
    """
    return -weight * drop_NK / scale_N[:, None]


def drop_to_go(drop_NK: torch.Tensor, scale_N: torch.Tensor, weight: float) -> torch.Tensor:
    """Charge each fall to its segment and to all that led there: A_k = -weight * (c_k + ... + c_K) / scale.

    The reward-to-go of the falls. Without slack, and where m_1 <= s_0, the sum telescopes to m_{k-1} - m_K.

    Args:
        drop_NK: falls >= 0, from `drops`.
        scale_N: `group_scale` of their sums.
        weight: 0 switches the term off.

    Returns:
        (N, K) advantages <= 0.
    """
    return drop(drop_NK.flip(1).cumsum(dim=1).flip(1), scale_N, weight)


def potential(
    clean_NK: torch.Tensor,
    start_N: torch.Tensor,
    segment_mask_NK: torch.Tensor,
    scale_N: torch.Tensor,
    weight: float,
) -> torch.Tensor:
    """Credit each segment with what the whole answer is worth beyond the text before it.

    A_k = weight * (m_K - m_{k-1}) / scale: the reward-to-go of the increments m_j - m_{j-1}, which telescope, so the
    optimum is that of the terminal reward m_K. What is subtracted is the baseline; no group mean comes on top.

    Args:
        clean_NK: m.
        start_N: s_0.
        segment_mask_NK: True where a row has a segment.
        scale_N: `group_scale` of m_K.
        weight: 0 switches the term off.

    Returns:
        (N, K) advantages, 0 beyond a row's segments.
    """
    gain_NK = final(clean_NK, segment_mask_NK)[:, None] - before(clean_NK, start_N)
    return (weight * gain_NK / scale_N[:, None]).masked_fill(~segment_mask_NK, 0.0)


def gate(advantage_NK: torch.Tensor, clean_NK: torch.Tensor, tau: float) -> torch.Tensor:
    """Let praise through only as far as the text is safe: A > 0 is scaled by clip((m - tau) / (1 - tau), 0, 1).

    Blame is not touched.

    Args:
        advantage_NK: advantage of the rewards; (N, 1) where it is the same at every segment.

    Returns:
        (N, K) advantages.
    """
    open_NK = ((clean_NK - tau) / (1 - tau)).clamp(0, 1)
    advantage_NK = advantage_NK.expand_as(clean_NK)
    return torch.where(advantage_NK > 0, advantage_NK * open_NK, advantage_NK)


def unsafe_from(clean_NK: torch.Tensor, segment_mask_NK: torch.Tensor, tau: float) -> torch.Tensor:
    """(N, K) True from the first segment with m < tau on; False beyond a row's segments, and where none is unsafe."""
    return (((clean_NK < tau) & segment_mask_NK).cumsum(dim=1) > 0) & segment_mask_NK


def mask(advantage_NK: torch.Tensor, unsafe_NK: torch.Tensor) -> torch.Tensor:
    """Nothing from the rewards, neither praise nor blame, from the first unsafe segment on.

    The tokens stay in the loss, with advantage 0, so that the KL, the entropy and the length counts keep them.

    Args:
        advantage_NK: advantage of the rewards, after `gate` where that is on.
        unsafe_NK: `unsafe_from`.

    Returns:
        (N, K) advantages.
    """
    return advantage_NK.masked_fill(unsafe_NK, 0.0)


def lagrangian(advantage_NK: torch.Tensor, unsafe_N: torch.Tensor, rate: float, price: float) -> torch.Tensor:
    """Rewards under a limit on unsafe completions: A = (A_R - price * (C - rate)) / (1 + price).

    The constraint is compared with the whole batch: within its own group, one that is unsafe as a whole would press
    with 0 exactly when it matters.

    Args:
        advantage_NK: A_R, the advantage of the rewards.
        unsafe_N: C, True where a completion is unsafe anywhere.
        rate: share of C over all scored completions of the batch, in [0, 1].
        price: the dual variable lambda >= 0, see `dual.DualVariable`.

    Returns:
        (N, K) advantages.
    """
    return (advantage_NK - price * (unsafe_N.to(advantage_NK.dtype)[:, None] - rate)) / (1 + price)


def token_kl(log_ratio_NT: torch.Tensor, before_NT: torch.Tensor, weight: float, clip: float) -> torch.Tensor:
    """Pull towards the reference where the text before is risky: A_t = -weight * (1 - m_{k(t)-1}) * clip(r_t, +-clip).

    Neither centred nor scaled. The weight comes from the segment before: one that depends on the sampled token is
    not the gradient of a weighted KL.

    Args:
        log_ratio_NT: r_t = log pi_old(y_t) - log pi_ref(y_t).
        before_NT: m_{k(t)-1}, `before` spread to tokens.
        weight: 0 switches the term off.
        clip: bound of r_t, either way.

    Returns:
        (N, T) advantages; the caller sets padding to 0.
    """
    return -weight * (1 - before_NT) * log_ratio_NT.clamp(-clip, clip)
