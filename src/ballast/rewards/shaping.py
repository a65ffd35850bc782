"""Shaping: from cleaned STAR to per-segment advantages. Each function is one term and knows no other.

    N completions in groups of G (rows n*G .. n*G+G-1 answer one prompt)   K segments

m is the cleaned STAR of `star.clean_trace`; s_0 the STAR of the empty response.
"""

import torch

from ballast.rewards.advantages import group_std


def drops(clean_NK: torch.Tensor, start_N: torch.Tensor, segment_mask_NK: torch.Tensor, slack: float) -> torch.Tensor:
    """How far STAR falls in each segment: c_k = max(0, m_{k-1} - m_k - slack), with m_0 = s_0.

    Args:
        clean_NK: m, non-increasing along K.
        start_N: s_0; a prompt that is risky by itself is no fall of the answer's.
        segment_mask_NK: True where a row has a segment.
        slack: a fall up to this counts as the guard's noise.

    Returns:
        (N, K) falls >= 0, 0 beyond a row's segments.
    """
    before_NK = torch.cat([start_N[:, None], clean_NK[:, :-1]], dim=1)
    return (before_NK - clean_NK - slack).clamp(min=0).masked_fill(~segment_mask_NK, 0.0)


def drop_advantage(drop_NK: torch.Tensor, scale_N: torch.Tensor, weight: float) -> torch.Tensor:
    """Charge each fall to its own segment: A_k = -weight * c_k / scale.

    Scaled and not centred: centring would praise segments for merely not falling.

    Args:
        drop_NK: falls >= 0, from `drops`.
        scale_N: `drop_scale` of each row's group.
        weight: 0 switches the term off.

    Returns:
        (N, K) advantages <= 0.
    """
    return -weight * drop_NK / scale_N[:, None]


def drop_scale(total_N: torch.Tensor, scored_N: torch.Tensor, group_size: int, std_floor: float) -> torch.Tensor:
    """(N,) what falls are divided by: the spread of their sums sum_k c_k within the group, at least the floor."""
    return group_std(total_N, scored_N, group_size).clamp(min=std_floor)


def gate(advantage_N: torch.Tensor, clean_NK: torch.Tensor, tau: float) -> torch.Tensor:
    """Let praise through only as far as the text is safe: A > 0 is scaled by clip((m - tau) / (1 - tau), 0, 1).

    Blame is not touched.

    Returns:
        (N, K) advantages.
    """
    open_NK = ((clean_NK - tau) / (1 - tau)).clamp(0, 1)
    advantage_NK = advantage_N[:, None].expand_as(clean_NK)
    return torch.where(advantage_NK > 0, advantage_NK * open_NK, advantage_NK)
