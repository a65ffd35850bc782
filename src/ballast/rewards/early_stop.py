"""A completion judged as if it had been cut off after its first unsafe segment.

N completions   K segments   T policy tokens
"""

from dataclasses import replace

import torch

from ballast.rewards.guard_reward import ScoredBatch
from ballast.rewards.shaping import unsafe_from
from ballast.rewards.star import clean_trace


def stopped_early(scored: ScoredBatch, tau: float) -> ScoredBatch:
    """The same batch without the segments after the first unsafe one of each completion.

    Unsafe is a debounced STAR below tau (`clean_trace`, whether or not the batch's own trace is cleaned): one low
    segment alone stops nothing, unless it is the last, after which there is nothing to leave out. The segment itself
    stays, and so does what it is charged. Texts, traces and token segments stay whole; `scores.segment_mask_NK` says
    what is left.

    Args:
        scored: a guard's judgement of whole completions.
        tau: STAR below which a segment is unsafe.
    """
    mask_NK = scored.scores.segment_mask_NK
    unsafe_NK = unsafe_from(clean_trace(scored.scores.star_NK, mask_NK), mask_NK, tau) & scored.scores.scored_N[:, None]
    after_NK = torch.cat([torch.zeros_like(unsafe_NK[:, :1]), unsafe_NK[:, :-1]], dim=1)
    return replace(scored, scores=replace(scored.scores, segment_mask_NK=mask_NK & ~after_NK))


def tokens_in_loss(scored: ScoredBatch, segment_NT: torch.Tensor) -> torch.Tensor:
    """(N, T) True at tokens of scored completions whose segment is left; False at padding."""
    left_N = scored.scores.segment_mask_NK.sum(dim=1)
    return (segment_NT >= 0) & (segment_NT < left_N[:, None]) & scored.scores.scored_N[:, None]
