"""Group statistics: every term is normalised in its own group first, and only then are terms added.

    N completions in groups of G (rows n*G .. n*G+G-1 answer one prompt)   R reward terms   K segments

NaN marks a row that a term does not apply to; `scored_N` False marks a row that the guard could not judge,
which takes part in no statistic and gets advantage 0. Groups straddle processes: gather before calling.
"""

from collections.abc import Mapping, Sequence

import torch


def group_mean(value_N: torch.Tensor, valid_N: torch.Tensor, group_size: int) -> torch.Tensor:
    """(N,) mean of each row's group over its valid rows; 0 where a group has none."""
    value_PG, valid_PG = value_N.view(-1, group_size), valid_N.view(-1, group_size)
    total_P = value_PG.masked_fill(~valid_PG, 0.0).sum(dim=1)
    return (total_P / valid_PG.sum(dim=1).clamp(min=1)).repeat_interleave(group_size)


def group_std(value_N: torch.Tensor, valid_N: torch.Tensor, group_size: int) -> torch.Tensor:
    """(N,) sample standard deviation (n - 1) of each row's group over its valid rows; 0 with fewer than two."""
    deviation_N = (value_N - group_mean(value_N, valid_N, group_size)).masked_fill(~valid_N, 0.0)
    count_P = valid_N.view(-1, group_size).sum(dim=1)
    variance_P = deviation_N.view(-1, group_size).square().sum(dim=1) / (count_P - 1).clamp(min=1)
    return variance_P.sqrt().repeat_interleave(group_size)


def enough_to_compare(valid_N: torch.Tensor, group_size: int) -> torch.Tensor:
    """(N,) True in groups with at least two valid rows; of fewer, none is better than another."""
    return (valid_N.view(-1, group_size).sum(dim=1) >= 2).repeat_interleave(group_size)


def group_zscore(value_N: torch.Tensor, scored_N: torch.Tensor, group_size: int, std_floor: float) -> torch.Tensor:
    """Z(x) = (x - group mean) / max(group std, floor).

    Args:
        value_N: one reward term; NaN where it does not apply.
        scored_N: False where the guard could not judge the row.
        group_size: G.
        std_floor: keeps a jitter in a group of equals from becoming a strong signal.

    Returns:
        (N,) scores; 0 in rows that are unscored or to which the term does not apply, and in groups with fewer
        than two others to compare with.
    """
    valid_N = scored_N & ~value_N.isnan()
    value_N = value_N.nan_to_num(0.0)
    z_N = (value_N - group_mean(value_N, valid_N, group_size)) / group_std(value_N, valid_N, group_size).clamp(
        min=std_floor
    )
    return z_N.masked_fill(~(valid_N & enough_to_compare(valid_N, group_size)), 0.0)


def weighted_zscores(
    reward_NR: torch.Tensor,
    weight_R: torch.Tensor,
    scored_N: torch.Tensor,
    group_size: int,
    std_floor: float | Sequence[float],
    over_batch: Sequence[int] = (),
) -> torch.Tensor:
    """(N, R) weight * Z(term). Summing raw rewards first would let spreads reweigh the terms.

    Args:
        std_floor: smallest spread that a term is divided by, one for all terms or one a term.
        over_batch: columns whose statistics are those of all N rows. Such a term still presses where a whole group
            gets the same reward, at the price of comparing prompts with one another.
    """
    floor_R = [std_floor] * reward_NR.size(1) if isinstance(std_floor, float | int) else list(std_floor)
    z_RN = [
        group_zscore(reward_N, scored_N, len(reward_N) if column in over_batch else group_size, floor)
        for column, (reward_N, floor) in enumerate(zip(reward_NR.unbind(dim=1), floor_R, strict=True))
    ]
    return torch.stack(z_RN, dim=1) * weight_R


def charged(z_NR: torch.Tensor, segments: int, opening: Mapping[int, int] | None = None) -> torch.Tensor:
    """(N, K) sum of the terms at each segment: a term counts at all of them, or at the first few only.

    A term that the first words of an answer decide says nothing about the rest; charged there too, it adds noise.

    Args:
        z_NR: `weighted_zscores`.
        segments: K.
        opening: column to the number of segments, from the first, that its term is charged to.
    """
    advantage_NK = z_NR.new_zeros(len(z_NR), segments)
    for column, z_N in enumerate(z_NR.unbind(dim=1)):
        advantage_NK[:, : (opening or {}).get(column, segments)] += z_N[:, None]
    return advantage_NK
