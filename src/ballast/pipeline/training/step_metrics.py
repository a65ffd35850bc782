"""What a training step is logged by: pure functions of one batch.

    N completions in groups of G   T policy tokens   R reward terms

NaN stands for "nothing to say": the trainer leaves it out of its averages.
"""

from collections.abc import Sequence

import torch

from ballast.rewards.advantages import group_mean
from ballast.rewards.guard_reward import ScoredBatch
from ballast.rewards.shaping import unsafe_from
from ballast.rewards.star import spread_to_tokens

NAN = float("nan")


def signal_sums(
    scored: ScoredBatch, advantage_NT: torch.Tensor, segment_NT: torch.Tensor, token_NT: torch.Tensor
) -> dict[str, tuple[float, float]]:
    """The guard's judgement and the advantages of this process's rows, as sums and how many each is over.

    Args:
        scored: the guard's judgement.
        advantage_NT: what the loss gets.
        segment_NT: segment of each token in the loss, -1 elsewhere.
        token_NT: segment of each token of the completion, -1 at padding.

    Returns:
        `risk/first_unsafe_token` is the mean index, from 0, of the first token of the first segment with a risk above
        one half, over the completions that have one; `loss/masked_share` the share of completions of which tokens
        are left out of the loss.
    """
    valid_N = scored.scores.scored_N
    risk_N = 1.0 - scored.lowest_star_N[valid_N]
    advantage = advantage_NT[segment_NT >= 0]
    unsafe_NK = unsafe_from(scored.clean_NK, scored.scores.segment_mask_NK, tau=0.5) & valid_N[:, None]
    unsafe_NT = spread_to_tokens(unsafe_NK.float(), token_NT) > 0
    first = unsafe_NT.float().argmax(dim=1)[unsafe_NT.any(dim=1)].float()
    masked_N = (segment_NT != token_NT).any(dim=1)
    return {
        "risk/mean": _over(risk_N),
        "risk/violation_rate": _over(risk_N > 0.5),
        "risk/first_unsafe_token": _over(first),
        "risk/unscored_share": _over(~valid_N),
        "advantage/mean": _over(advantage),
        "advantage/negative_share": _over(advantage < 0),
        "loss/masked_share": _over(masked_N),
    }


def _over(values: torch.Tensor) -> tuple[float, float]:
    return values.double().sum().item(), float(values.numel())


def reward_metrics(
    names: Sequence[str], reward_NR: torch.Tensor, weight_R: torch.Tensor, scored_N: torch.Tensor
) -> dict[str, float]:
    """Mean of every term, and of the terms' weighted mean, over the rows that the guard could judge.

    Args:
        names: (R,) names of the terms.
        reward_NR: rewards; NaN where a term does not apply.
        weight_R: weights of the terms.
        scored_N: False where the guard could not judge the row.

    Returns:
        `reward/NAME` over the rows that a term applies to, and `reward/total`: a row's total is the weighted mean
        of the terms that apply to it, so that kinds with few terms and kinds with many are on one scale.
    """
    valid_NR = scored_N[:, None] & ~reward_NR.isnan()
    value_NR = reward_NR.nan_to_num(0.0)
    weight_N = (valid_NR * weight_R).sum(dim=1)
    total_N = (value_NR * valid_NR * weight_R).sum(dim=1)[weight_N > 0] / weight_N[weight_N > 0]
    means = {
        f"reward/{name}": value_N[valid_N].mean().item() if valid_N.any() else NAN
        for name, value_N, valid_N in zip(names, value_NR.unbind(1), valid_NR.unbind(1), strict=True)
    }
    return {**means, "reward/total": total_N.mean().item() if len(total_N) else NAN}


def row_mean(advantage_NT: torch.Tensor, segment_NT: torch.Tensor) -> torch.Tensor:
    """(N,) mean advantage of each row's tokens; 0 for a row without any."""
    return advantage_NT.sum(dim=1) / (segment_NT >= 0).sum(dim=1).clamp(min=1)


def group_metrics(advantage_N: torch.Tensor, scored_N: torch.Tensor, group_size: int) -> dict[str, float]:
    """Lowest and highest mean advantage of a group, over its scored rows.

    A baseline puts it at 0 and gating moves it away: a group far below 0 is pushed down as a whole, whatever its
    rows are in comparison with each other.
    """
    has_scored_N = scored_N.view(-1, group_size).any(dim=1).repeat_interleave(group_size)
    mean_N = group_mean(advantage_N, scored_N, group_size)[has_scored_N]
    return {
        "advantage/group_mean_min": mean_N.min().item() if len(mean_N) else NAN,
        "advantage/group_mean_max": mean_N.max().item() if len(mean_N) else NAN,
    }
