"""The guardrail's part: judgements off the event loop, never more at once than allowed, never waited for longer.

A guard blocks, may hang, raise or answer what was not asked. Whatever it does, a segment ends up with a risk or
with a `Failure`; nothing here turns a failure into a risk.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ballast.errors import BallastError, GuardError
from ballast.guardrails.types import Exchange, Guardrail, GuardSession, Message, StreamingGuardrail
from ballast.pipeline.config_serve import ServeGuard
from ballast.pipeline.serving.metrics import Metrics

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """A judgement that the guard did not give.

    Attributes:
        kind: it took too long, raised, could not score the text, or answered what was not asked.
        detail: the exception's type; never its message, which may quote the text.
    """

    kind: Literal["timeout", "error", "unscored", "broken"]
    detail: str = ""


class Workers:
    """A few threads that end with the process, even where a guard hangs in one of them.

    (Those of `concurrent.futures` are waited for at exit.)

    Args:
        count: threads; they start with the first job.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread. Cancelled before it has begun it never runs; later its result is dropped."""
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._serve, name=f"guard-{number}", daemon=True)
                for number in range(self._count)
            ]
            for thread in self._threads:
                thread.start()
        job = _Job(work, asyncio.get_running_loop())
        self._jobs.put(job)
        try:
            result: T = await job.future
        except asyncio.CancelledError:
            job.dropped = True
            raise
        return result

    def close(self) -> None:
        """Let the threads end once they are free."""
        for _ in self._threads:
            self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()


class _Job:
    def __init__(self, work: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._work, self._loop = work, loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.dropped = False

    def run(self) -> None:
        if self.dropped:
            return
        result, error = None, None
        try:
            result = self._work()
        except BaseException as raised:  # a worker outlives whatever a guard raises, SystemExit too
            error = raised
        with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            self._loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            self.future.set_exception(error)
        else:
            self.future.set_exception(RuntimeError(type(error).__name__))


class Judge:
    """One guard for all answers of a gateway.

    Args:
        guard: who judges; its sessions are used where it has them, since they cost what is new only.
        options: time-out and number of workers.
        metrics: where calls and failures are counted.
    """

    def __init__(self, guard: Guardrail, options: ServeGuard, metrics: Metrics) -> None:
        self.guard, self._options, self._metrics = guard, options, metrics
        self._workers = Workers(options.workers)
        self.failed_in_a_row = 0

    def open(self, messages: Sequence[Message]) -> "Judgement":
        """Begin judging one answer."""
        return Judgement(self, tuple(messages))

    def close(self) -> None:
        """Let the workers end."""
        self._workers.close()

    async def warm_up(self) -> None:
        """Load the guard and let it judge a short text, however long that takes.

        Raises:
            GuardError: it did not judge it.
            BallastError: what it raised itself, such as a `ModelError` of missing weights.
        """
        messages = (Message(role="user", content="What is the capital of France?"),)
        judgement = Judgement(self, messages)
        try:
            (risk,) = await self._workers.run(lambda: judgement.judge(None, [], "", ["It is Paris."]))
        except BallastError:
            raise
        except Exception as error:
            risk = Failure("error", f"{type(error).__name__}: {error}")  # the text is ours, so it may be quoted
        if isinstance(risk, Failure):
            why = f"{risk.kind}, {risk.detail}" if risk.detail else risk.kind
            raise GuardError(
                f"guardrail '{self.guard.name}' does not judge a short plain text ({why}), so every answer would be blocked; see what "
                "`ballast guard check` says about it, and start its server if it has one"
            )

    async def call(self, work: "Callable[[], list[float | Failure]]") -> list[float | Failure]:
        """What `work` gives in a worker, or a single failure."""
        started = time.perf_counter()
        outcome: list[float | Failure]
        try:
            async with asyncio.timeout(self._options.timeout_s):
                outcome = await self._workers.run(work)
        except TimeoutError as error:
            # A guard may raise TimeoutError itself; then the worker is free and the time is not up.
            late = time.perf_counter() - started >= self._options.timeout_s
            outcome = [Failure("timeout") if late else Failure("error", type(error).__name__)]
        except Exception as error:
            outcome = [Failure("error", type(error).__name__)]
        self._metrics.guard_seconds.observe(time.perf_counter() - started)
        failures = [one for one in outcome if isinstance(one, Failure)]
        for failure in failures:
            self._metrics.guard_failures.labels(failure.kind).inc()
        self.failed_in_a_row = self.failed_in_a_row + 1 if failures else 0
        return outcome


class Judgement:
    """One answer judged while it is written."""

    def __init__(self, judge: Judge, messages: tuple[Message, ...]) -> None:
        self._judge, self._messages = judge, messages
        self._session: GuardSession | None = None
        self._streams = isinstance(judge.guard, StreamingGuardrail)

    async def risks(self, before: str, segments: Sequence[str]) -> list[float | Failure]:
        """The risk of the answer at the end of each segment.

        Args:
            before: the answer up to these segments.
            segments: what comes next, one or more.

        Returns:
            One risk a segment, in their order, ended early by the first failure.
        """
        # The session belongs to this call: after a time-out a thread may still be in it, and it is never used again.
        session, self._session = self._session, None
        holder: list[GuardSession] = []

        outcome = await self._judge.call(lambda: self.judge(session, holder, before, segments))
        if holder and not any(isinstance(one, Failure) for one in outcome):
            self._session = holder[0]
        return outcome

    def judge(
        self, session: GuardSession | None, holder: list[GuardSession], before: str, segments: Sequence[str]
    ) -> list[float | Failure]:
        """As `risks`, in the calling thread; a session that can be used again is put into `holder`."""
        return self._push(session, holder, before, segments) if self._streams else self._assess(before, segments)

    def _push(
        self, session: GuardSession | None, holder: list[GuardSession], before: str, segments: Sequence[str]
    ) -> list[float | Failure]:
        guard = self._judge.guard
        assert isinstance(guard, StreamingGuardrail)
        if session is None:
            session = guard.open(self._messages)
            if before:  # after a failure that was let pass
                session.push(before)
        risks: list[float | Failure] = []
        for segment in segments:
            risks.append(_risk(session.push(segment)))
            if isinstance(risks[-1], Failure):
                return risks
        holder.append(session)
        return risks

    def _assess(self, before: str, segments: Sequence[str]) -> list[float | Failure]:
        cuts, end = [], len(before)
        for segment in segments:
            end += len(segment)
            cuts.append(end)
        traces = self._judge.guard.assess([Exchange(self._messages, before + "".join(segments))], [cuts])
        if not isinstance(traces, list) or len(traces) != 1 or tuple(traces[0].cuts) != tuple(cuts):
            return [Failure("broken", "another number of traces, or other cuts")]
        risks: list[float | Failure] = []
        for risk in traces[0].risk:
            risks.append(_risk(risk))
            if isinstance(risks[-1], Failure):
                break
        return risks


def _risk(value: Any) -> float | Failure:
    """A number in [0, 1] as it is; what is no such number is no judgement."""
    if value is None:
        return Failure("unscored")
    if isinstance(value, bool) or not isinstance(value, float | int) or not 0.0 <= value <= 1.0:  # NaN fails this, too
        return Failure("broken", "no number in [0, 1]")
    return float(value)
