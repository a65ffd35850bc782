"""A guardrail as a reward: for TRL's `reward_funcs` as it is, and as the signal behind shaped advantages."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ballast.guardrails.asking import ask
from ballast.guardrails.remote import ServerMeter
from ballast.guardrails.segments import SegmentOptions, cut_response, segment_of_tokens, token_char_ends
from ballast.guardrails.types import Exchange, Guardrail, RiskTrace
from ballast.rewards.conversation import as_messages
from ballast.rewards.star import SegmentScores, clean_trace, segment_scores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredBatch:
    """What a guard said about one batch of completions.

    Attributes:
        texts: (N,) decoded completions that the guard read.
        traces: (N,) risk traces, the cut 0 first.
        segments: (N, T_n) segment index of every policy token.
        scores: STAR, padded.
        clean_NK: cleaned STAR m (or plain STAR where cleaning is off).
        seconds: time that the guard took.
        servers: what happened at the guard's servers meanwhile (see `ServerMeter`); empty where it asks none.
    """

    texts: tuple[str, ...]
    traces: tuple[RiskTrace, ...]
    segments: tuple[tuple[int, ...], ...]
    scores: SegmentScores
    clean_NK: torch.Tensor
    seconds: float
    servers: Mapping[str, float] = field(default_factory=dict)

    @property
    def lowest_star_N(self) -> torch.Tensor:
        """(N,) the lowest cleaned STAR of each completion; NaN where unscored."""
        lowest_N = self.clean_NK.masked_fill(~self.scores.segment_mask_NK, 1.0).min(dim=1).values
        return lowest_N.masked_fill(~self.scores.scored_N, float("nan"))


class GuardReward:
    """Reward of a completion: its lowest cleaned STAR, in [0, 1]; None where the guard could not judge.

    Goes into stock TRL's `reward_funcs` (GRPO, RLOO). The guard reads text decoded from `completion_ids`, not
    TRL's parsed messages, so nothing that the policy wrote is hidden from it. `last` keeps the per-token signal
    of the latest call. TRL warns about a row without any reward by printing its prompt and completion; once a
    `GuardReward` exists, that warning comes without them.

    Args:
        guard: any `Guardrail`.
        tokenizer: the policy's tokenizer, which the completions are decoded with.
        segments: where responses are cut; 5 words by default.
        clean: debounce and running minimum (see `star.clean_trace`).
    """

    def __init__(
        self, guard: Guardrail, tokenizer: Any, segments: SegmentOptions | None = None, clean: bool = True
    ) -> None:
        self.guard = guard
        self._meter = ServerMeter(guard)
        self.tokenizer = tokenizer
        self.segments = segments or SegmentOptions()
        self.clean = clean
        self.last: ScoredBatch | None = None
        self.__name__ = "star"  # TRL names a reward's metrics by this
        for trainer in ("grpo", "rloo"):
            logging.getLogger(f"trl.trainer.{trainer}_trainer").addFilter(_withhold_texts)

    def __call__(self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        """Score a batch as TRL hands it over: one reward a completion, None where unscored."""
        self.last = self.score(prompts, completion_ids)
        return [None if value != value else value for value in self.last.lowest_star_N.tolist()]

    def score(self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> ScoredBatch:
        """Judge every segment of every completion in one call of the guard.

        Args:
            prompts: (N,) conversations (lists of role/content messages) or plain strings.
            completion_ids: (N, T_n) the policy's own tokens.

        A guard that raises on the batch is asked again row by row, so that one bad row does not cost the others
        their scores. A row on which it raises alone is unscored; its reason is the exception's type and not its
        message, which may quote the completion.

        Raises:
            GuardError: the guard broke its contract: it left out exchanges or changed the cuts.
            BallastError: whatever else of ours the guard raised, such as a `ModelError` of missing weights: it
                would fail on every row, and says what to do.
        """
        started = time.perf_counter()
        texts, all_cuts, segments, exchanges = [], [], [], []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            text, ends = token_char_ends(self.tokenizer, ids)
            cuts = cut_response(text, self.segments, ends)
            texts.append(text)
            segments.append(tuple(segment_of_tokens(ends, cuts)))
            all_cuts.append((0, *cuts) if text else (0,))
            exchanges.append(Exchange(as_messages(prompt), text))
        traces = ask(self.guard, exchanges, all_cuts)
        scores = segment_scores(traces)
        clean_NK = clean_trace(scores.star_NK, scores.segment_mask_NK) if self.clean else scores.star_NK
        seconds = time.perf_counter() - started
        return ScoredBatch(tuple(texts), tuple(traces), tuple(segments), scores, clean_NK, seconds, self._meter.read())


def _withhold_texts(record: logging.LogRecord) -> bool:
    """Take prompt and completion out of TRL's warning about a row that no reward function scored."""
    if str(record.msg).startswith("All reward functions returned None"):
        record.msg = "every reward function returned None for at least one completion (texts withheld)"
        record.args = ()
    return True
