"""The rule of the gateway: text leaves only after the guardrail has passed it.

What the model server writes is held back in `tail`. Where a segment is complete it is judged together with all
that came before it; only then it is yielded, and only what is yielded ever reaches a client. Segments are those
of training (`segments.cut_response`): a segment is complete once the next one has begun, or the answer has
ended. The first segment over the threshold ends it all, and the connection to the model server is closed before
anything else is done.
"""

import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ballast.guardrails.segments import SegmentOptions, cut_response
from ballast.pipeline.config_serve import ServeConfig
from ballast.pipeline.serving.audit import AuditLog
from ballast.pipeline.serving.judging import Failure, Judge, Judgement
from ballast.pipeline.serving.metrics import Metrics
from ballast.pipeline.serving.problems import guard_unavailable
from ballast.pipeline.serving.requests import Ask
from ballast.pipeline.serving.upstream import Finish, Piece, Upstream, Usage

_log = logging.getLogger(__name__)

# Segments of one call of the guard, so that the time-out of a call is that of a few segments.
_MOST_TOGETHER = 8
# A segment without an end (white space only) is cut here, so that what is held back has a bound.
_LONGEST_SEGMENT = 4096


@dataclass(frozen=True)
class Released:
    """Text that the guardrail has passed."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The end of the answer.

    Attributes:
        finish: the model server's reason, or content_filter where the guardrail ended it.
        usage: token counts, where the model server told them.
    """

    finish: Finish
    usage: Usage | None = None


class Releaser:
    """Answers of a gateway, guarded.

    Args:
        settings: threshold, segments, limits and what a failure of the guard does.
        upstream: who writes.
        judge: who judges; None releases everything as it comes.
        audit: where decisions are recorded.
        metrics: where they are counted.
    """

    def __init__(
        self, settings: ServeConfig, upstream: Upstream, judge: Judge | None, audit: AuditLog, metrics: Metrics
    ) -> None:
        self.settings, self.upstream, self.judge, self.audit, self.metrics = settings, upstream, judge, audit, metrics

    async def release(self, ask: Ask, request_id: str) -> AsyncGenerator[Released | Ended]:
        """Ask the model server and yield what may be released, and the end.

        Raises:
            Problem: the model server failed, or the guardrail did while it is set to block then.
        """
        async with self.upstream.answer(ask) as pieces:
            answer = _Answer(self, ask, request_id)
            async for piece in pieces:
                for segments in answer.take(piece):
                    for text in await answer.judge(segments):
                        yield Released(text)
                    if answer.over:
                        break
                if answer.over:
                    break
        # The connection is closed by now, so the model server writes no more.
        yield answer.end()


class _Answer:
    """One answer on its way."""

    def __init__(self, releaser: Releaser, ask: Ask, request_id: str) -> None:
        self._of, self._id = releaser, request_id
        self._options = releaser.settings.guarding
        self._judgement: Judgement | None = releaser.judge.open(ask.messages) if releaser.judge else None
        self._passed = ""  # judged and released
        self._tail = ""  # written and not judged
        self._blocked = self._failed = self._full = False
        self._finish: Finish | None = None
        self._usage: Usage | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more is released, whatever is written."""
        return self._blocked or self._failed or self._full

    def end(self) -> Ended:
        """The end of the answer, once it is over or everything has been released.

        Raises:
            Problem: it is over since the guard failed.
        """
        if self._failed:
            raise guard_unavailable()
        if self._blocked:
            return Ended("content_filter")
        if self._full:
            return Ended("length")
        assert self._finish is not None  # the model server's answer ends with a reason, or raises
        return Ended(self._finish, self._usage)

    def take(self, piece: Piece) -> Iterator[list[str]]:
        """Hold back what was written; the segments that are complete by now, a few at a time."""
        self._finish, self._usage = piece.finish or self._finish, piece.usage or self._usage
        room = self._of.settings.limits.answer_chars - len(self._passed) - len(self._tail)
        full = len(piece.text) > room
        self._tail += piece.text[:room]
        if self._judgement is None:
            segments, self._tail = [self._tail] if self._tail else [], ""
        else:
            complete = full or piece.finish is not None
            segments, self._tail = split_segments(self._tail, self._options.segments, complete)
        for start in range(0, len(segments), _MOST_TOGETHER):
            yield segments[start : start + _MOST_TOGETHER]
        self._full = full

    async def judge(self, segments: list[str]) -> list[str]:
        """Those of the segments that may be released; the answer is over where one may not."""
        passed: list[str] = []
        while segments and not self.over:
            started = time.perf_counter()
            outcome: Sequence[float | Failure] = [0.0] * len(segments)
            if self._judgement is not None:
                outcome = await self._judgement.risks(self._passed, segments)
            seconds = round(time.perf_counter() - started, 4)
            for segment, risk in zip(segments, outcome, strict=False):
                if not self._decide(segment, risk, seconds):
                    break
                self._passed += segment
                passed.append(segment)
            segments = segments[len(outcome) :]  # after a failure that was let pass, the others are asked again
        return passed

    def _decide(self, segment: str, risk: float | Failure, seconds: float) -> bool:
        """Whether a segment is released; every decision is recorded."""
        if isinstance(risk, Failure):
            opened = self._options.on_failure == "release"
            self._record("unguarded" if opened else "failed", segment, seconds, failure=risk.kind, detail=risk.detail)
            _log.warning(
                "guardrail '%s' did not judge a segment (%s%s); it is %s",
                self._of.judge.guard.name if self._of.judge else "",
                risk.kind,
                f", {risk.detail}" if risk.detail else "",
                "released unguarded, as serve.guarding.on_failure says" if opened else "not released",
            )
            self._failed = not opened
            return opened
        self._blocked = risk >= self._options.threshold
        self._record("blocked" if self._blocked else "released", segment, seconds, risk=round(risk, 6))
        return not self._blocked

    def _record(self, decision: str, segment: str, seconds: float, **fields: Any) -> None:
        self._of.metrics.segments.labels(decision).inc()
        self._of.audit.write(
            decision,
            text=segment,
            request=self._id,
            begin=len(self._passed),
            end=len(self._passed) + len(segment),
            seconds=seconds,
            **fields,
        )


def split_segments(tail: str, options: SegmentOptions, complete: bool) -> tuple[list[str], str]:
    """Cut what is held back into complete segments and a rest.

    Args:
        tail: text since the last cut.
        options: words or sentences.
        complete: no more will come, so that the rest is a segment, too.

    Returns:
        Segments that do not change whatever is written after them, and the rest, empty where it is complete.
    """
    segments: list[str] = []
    start = 0
    # The last cut is the end of what is there by now, and moves when more is written.
    for cut in cut_response(tail, options)[:-1]:
        segments += _bounded(tail[start:cut])
        start = cut
    *more, rest = _bounded(tail[start:]) or [""]
    segments += more
    return ([*segments, rest], "") if complete and rest else (segments, rest)


def _bounded(text: str) -> list[str]:
    return [text[start : start + _LONGEST_SEGMENT] for start in range(0, len(text), _LONGEST_SEGMENT)]
