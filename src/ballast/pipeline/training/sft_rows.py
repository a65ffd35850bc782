"""From answers and a guard's risk to rows that `ShapedSFTTrainer` learns from: token ids with a STAR each.

    K segments of an answer   T tokens of a row, prompt and answer

A token gets the STAR of the segment that it lies in, found by decoding the row's own ids; prompt tokens carry no
label, and have 1. Rows are cut last, ids and STAR at the same place.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ballast.errors import DataError
from ballast.guardrails.segments import segment_of_tokens, token_char_ends
from ballast.guardrails.types import RiskTrace
from ballast.pipeline import ranks
from ballast.pipeline.config_sft import CorrectedLoss, RejectLoss, SFTLoss
from ballast.pipeline.training.sft_batches import STAR_COLUMN
from ballast.rewards.guard_reward import GuardReward
from ballast.rewards.star import clean_trace, segment_scores

_BINS = 10  # of the histogram, and one more for exactly 1


@dataclass(frozen=True)
class Answer:
    """One answer to imitate.

    Attributes:
        id: the row it came from.
        kind: of its prompt: harmful, scary or ordinary.
        messages: the conversation that it answers.
        prompt_ids: token ids up to where the answer begins.
        ids: token ids of the answer, with its end-of-turn token where it has one.
    """

    id: str
    kind: str
    messages: tuple[Any, ...]
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer with the guard's judgement.

    Attributes:
        answer: the answer.
        trace: risk at every cut, the cut 0 first.
        segments: (T_answer,) segment of every token of the answer.
    """

    answer: Answer
    trace: RiskTrace
    segments: tuple[int, ...]


def judge(
    answers: Sequence[Answer], reward: GuardReward, batch_size: int = 64, progress: Callable[[int], None] | None = None
) -> list[JudgedAnswer]:
    """Ask the guard about every answer, whole, a batch at a time; processes that train together share them out.

    Raises:
        BallastError: as `GuardReward.score`.
    """
    own, judged = ranks.own_share(answers), []
    for start in range(0, len(own), batch_size):
        batch = own[start : start + batch_size]
        scored = reward.score([answer.messages for answer in batch], [answer.ids for answer in batch])
        judged += [JudgedAnswer(*row) for row in zip(batch, scored.traces, scored.segments, strict=True)]
        if progress is not None:
            progress(len(batch))
    if ranks.world() == 1:
        return judged
    every = ranks.collected([[asdict(row.trace), row.segments] for row in judged])
    return [
        JudgedAnswer(answer, RiskTrace(**{name: _as_made(value) for name, value in trace.items()}), tuple(segments))
        for answer, (trace, segments) in zip(answers, every, strict=True)
    ]


def _as_made(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def judged_before(answer: Answer, trace: RiskTrace, tokenizer: Any) -> JudgedAnswer:
    """An answer whose risk is known already, from the table of the stage `score`.

    Raises:
        DataError: the cuts are not those of this text.
    """
    text, ends = token_char_ends(tokenizer, answer.ids)
    if trace.cuts[0] != 0 or trace.cuts[-1] != len(text):
        raise DataError(
            f"row {answer.id}: its scores go from character {trace.cuts[0]} to {trace.cuts[-1]}, and its text has {len(text)}; the table "
            "was made with another tokenizer, so delete the stages rollout and score and run them again"
        )
    return JudgedAnswer(answer, trace, tuple(segment_of_tokens(ends, trace.cuts[1:] or trace.cuts)))


def star_of_segments(trace: RiskTrace, loss: SFTLoss) -> list[float] | None:
    """(K,) STAR of the segments of a response as a loss reads it; None where a cut that it reads is unscored.

    The verdict on the whole response stands at its last cut: under `RejectLoss` it is 0 or 1 for every segment.
    `CorrectedLoss` cleans the trace, if it is set to. The floor of `CorrectedLoss` is applied by the trainer.
    """
    segments = max(1, len(trace.cuts) - 1)
    if isinstance(loss, RejectLoss):
        risk = trace.risk[-1]
        return None if risk is None else [float(risk < loss.threshold)] * segments
    if not trace.scored:
        return None
    scores = segment_scores([trace])
    cleaned = isinstance(loss, CorrectedLoss) and loss.clean_trace
    star_NK = clean_trace(scores.star_NK, scores.segment_mask_NK) if cleaned else scores.star_NK
    star_K: list[float] = star_NK[0].tolist()
    return star_K


def columns(
    answer: Answer, max_length: int, star_K: Sequence[float] | None = None, segments: Sequence[int] | None = None
) -> dict[str, list[Any]]:
    """One row for the trainer: `input_ids`, `completion_mask` and, given STAR, `star`, cut to `max_length`.

    Args:
        answer: prompt and answer.
        max_length: tokens that are kept.
        star_K: (K,) STAR of the segments; None for losses that ask no guard.
        segments: (T_answer,) segment of every token of the answer; needed with `star_K`.

    Raises:
        DataError: the prompt alone fills `max_length`.
    """
    prompt = len(answer.prompt_ids)
    if prompt >= max_length:
        raise DataError(
            f"row {answer.id}: its prompt has {prompt} tokens, so sft.max_length = {max_length} leaves no room for the answer; raise it or "
            "drop the row"
        )
    row: dict[str, list[Any]] = {
        "input_ids": [*answer.prompt_ids, *answer.ids][:max_length],
        "completion_mask": ([0] * prompt + [1] * len(answer.ids))[:max_length],
    }
    if star_K is not None and segments is not None:
        row[STAR_COLUMN] = ([1.0] * prompt + [star_K[k] for k in segments])[:max_length]
    return row


def star_histogram(rows: Sequence[tuple[str, Sequence[float]]]) -> dict[str, list[int]]:
    """How often each STAR occurs, by kind: counts of segments in [0, .1), [.1, .2) ... [.9, 1), and of exactly 1.

    On benign kinds everything below the floor is loss that leaks away.

    Args:
        rows: kind and (K,) STAR of each answer.
    """
    counts: dict[str, list[int]] = {}
    for kind, star_K in rows:
        bins = counts.setdefault(kind, [0] * (_BINS + 1))
        for star in star_K:
            bins[_BINS if star >= 1 else int(star * _BINS)] += 1
    return counts
