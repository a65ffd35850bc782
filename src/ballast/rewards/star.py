"""STAR: how safe a response is up to each cut, and where those scores fall on the policy's tokens.

    N completions   K segments   T policy tokens

STAR of segment k is s_k = 1 - risk at the cut that ends it (arXiv 2505.17196, eq. 2). s_0 belongs to the
empty response and measures the prompt alone; it is kept apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ballast.guardrails.types import RiskTrace


@dataclass(frozen=True)
class SegmentScores:
    """STAR of a batch, padded.

    Attributes:
        star_NK: s_1 .. s_K in [0, 1]; 0 beyond a row's last segment and in unscored rows.
        start_N: s_0, STAR of the empty response.
        segment_mask_NK: True where a row has a segment.
        scored_N: True where the guard judged every cut of the row.
    """

    star_NK: torch.Tensor
    start_N: torch.Tensor
    segment_mask_NK: torch.Tensor
    scored_N: torch.Tensor


def segment_scores(traces: Sequence[RiskTrace]) -> SegmentScores:
    """Pad the risk traces of a batch into tensors.

    Args:
        traces: (N,) traces whose first cut is 0, the empty response, followed by one cut a segment. An empty
            response has the cut 0 alone; it counts as one segment with the STAR of the prompt.

    Raises:
        ValueError: a trace does not begin at cut 0.
    """
    if any(not trace.cuts or trace.cuts[0] != 0 for trace in traces):
        raise ValueError("every trace must begin with the cut 0, the empty response, which increments start from")
    N = len(traces)
    K = max((max(1, len(trace.cuts) - 1) for trace in traces), default=1)
    star_NK, start_N = torch.zeros(N, K), torch.zeros(N)
    mask_NK, scored_N = torch.zeros(N, K, dtype=torch.bool), torch.zeros(N, dtype=torch.bool)
    for n, trace in enumerate(traces):
        segments = max(1, len(trace.cuts) - 1)
        mask_NK[n, :segments] = True
        if trace.scored:
            risk = torch.tensor(trace.risk, dtype=torch.float32)
            scored_N[n] = True
            start_N[n] = 1 - risk[0]
            star_NK[n, :segments] = 1 - (risk[1:] if len(risk) > 1 else risk)
    return SegmentScores(star_NK, start_N, mask_NK, scored_N)


def clean_trace(star_NK: torch.Tensor, segment_mask_NK: torch.Tensor) -> torch.Tensor:
    """Debounce, then running minimum: one low segment alone does not count, and a safe ending undoes nothing.

    Debounced s~_k = max(s_{k-1}, s_k) for 1 < k < K; the first and the last segment keep their own score, or
    a policy would learn to put the harm last. Then m_k = min(s~_1 .. s~_k).

    Args:
        star_NK: s_1 .. s_K in [0, 1].
        segment_mask_NK: True where a row has a segment.

    Returns:
        (N, K) m, non-increasing along K inside the mask; beyond it the last value is carried on.
    """
    previous_NK = torch.cat([star_NK[:, :1], star_NK[:, :-1]], dim=1)
    last_NK = segment_mask_NK & ~torch.cat([segment_mask_NK[:, 1:], torch.zeros_like(segment_mask_NK[:, :1])], dim=1)
    debounced_NK = torch.where(last_NK, star_NK, torch.maximum(previous_NK, star_NK))
    return debounced_NK.masked_fill(~segment_mask_NK, 1.0).cummin(dim=1).values


def spread_to_tokens(value_NK: torch.Tensor, segment_NT: torch.Tensor) -> torch.Tensor:
    """Give each token the value of its segment.

    Args:
        value_NK: a value a segment.
        segment_NT: index 0..K-1 of each token's segment, -1 at padding.

    Returns:
        (N, T) values, 0 at padding.
    """
    value_NT = value_NK.gather(1, segment_NT.clamp(min=0))
    return value_NT.masked_fill(segment_NT < 0, 0.0)


def pad_segments(segments: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """(N, T=width) segment index of each token, -1 at padding, from ragged lists."""
    segment_NT = torch.full((len(segments), width), -1, dtype=torch.long)
    for n, row in enumerate(segments):
        segment_NT[n, : len(row)] = torch.tensor(row, dtype=torch.long)
    return segment_NT
