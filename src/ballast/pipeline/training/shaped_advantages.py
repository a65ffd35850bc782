"""The shaping terms of a configuration, added up: the one place that knows which are on.

N completions on this process, in groups of G   K segments
"""

from collections.abc import Callable

import torch

from ballast.pipeline.config_shaping import ShapingConfig
from ballast.rewards import shaping as term
from ballast.rewards.guard_reward import ScoredBatch

Gather = Callable[[torch.Tensor], torch.Tensor]


def violations(scored: ScoredBatch, tau: float) -> torch.Tensor:
    """(N,) True where a completion's STAR falls below tau anywhere; False in unscored rows."""
    return scored.lowest_star_N < tau  # NaN, of an unscored row, is below nothing


def violation_rate(scored: ScoredBatch, tau: float, gather: Gather) -> float | None:
    """Share of unsafe completions over the scored rows of all processes; None where none is scored."""
    valid_N = gather(scored.scores.scored_N)
    return gather(violations(scored, tau))[valid_N].float().mean().item() if valid_N.any() else None


def shaped_advantages(
    config: ShapingConfig,
    reward_advantage_NK: torch.Tensor,
    scored: ScoredBatch,
    *,
    group_size: int,
    gather: Gather,
    own: slice,
    price: float,
    rate: float | None,
) -> torch.Tensor:
    """Every term but the per-token KL, which knows tokens and not segments.

    The gate and the mask act on the rewards' advantage; the constraint then weighs what they left against itself;
    drop and potential come on top.

    Args:
        config: which terms are on.
        reward_advantage_NK: sum of the rewards' z-scores, each at the segments that it is charged to.
        scored: the guard's judgement of this process's rows.
        group_size: G.
        gather: rows of all processes, since groups straddle them.
        own: this process's rows among them.
        price: dual variable of the constraint.
        rate: `violation_rate` of the batch.

    Returns:
        (N, K) advantages, 0 in unscored rows.
    """
    clean_NK, start_N, mask_NK = scored.clean_NK, scored.scores.start_N, scored.scores.segment_mask_NK
    scored_all_N = gather(scored.scores.scored_N)

    def scale(value_N: torch.Tensor, std_floor: float) -> torch.Tensor:
        return term.group_scale(gather(value_N), scored_all_N, group_size, std_floor)[own]

    advantage_NK = reward_advantage_NK
    if config.gate.enabled:
        advantage_NK = term.gate(advantage_NK, clean_NK, config.gate.tau)
    if config.mask.enabled:
        advantage_NK = term.mask(advantage_NK, term.unsafe_from(clean_NK, mask_NK, config.mask.tau))
    if config.lagrangian.enabled and rate is not None:
        unsafe_N = violations(scored, config.lagrangian.tau)
        advantage_NK = term.lagrangian(advantage_NK, unsafe_N, rate, price)
    if config.drop.weight > 0:
        drop_NK = term.drops(clean_NK, start_N, mask_NK, config.drop.slack)
        charge = term.drop_to_go if config.drop.to_go else term.drop
        advantage_NK = advantage_NK + charge(drop_NK, scale(drop_NK.sum(1), config.drop.std_floor), config.drop.weight)
    if config.potential.weight > 0:
        scale_N = scale(term.final(clean_NK, mask_NK), config.potential.std_floor)
        advantage_NK = advantage_NK + term.potential(clean_NK, start_N, mask_NK, scale_N, config.potential.weight)
    return advantage_NK.masked_fill(~scored.scores.scored_N[:, None], 0.0)
