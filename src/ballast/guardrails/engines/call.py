"""Many requests to a pool of servers, as one call: who is asked again, when, and when a call gives up.

* Connection errors, time-outs, 408, 429 and 5xx are tried again: at once at another server that is in use, or at the
  same one after `backoff_s * 2**n` seconds, less a random part. `Retry-After` is obeyed by all requests to that
  server, up to `timeout_s`. Other statuses, and answers that do not fit, are asked of another server only; 400, 413
  and 422 are final.
* Once `_ROWS_IN_A_ROW` requests in a row have failed for good, the servers count as down: each is tried once a request
  and not waited for, until one answers. So a batch sent to dead servers ends soon, and one request that a server
  chokes on loses no others.
* No wait and no attempt is longer than `timeout_s`, so one request takes at most `(2 * retries + 1) * timeout_s`,
  beside what it waits for a place at a server. That is also the call's patience: after so long without any answer,
  every request that is left is unanswered.
* A request that was hedged has one answer: the first that can be used. The other request is cancelled.
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ballast.guardrails.engines.endpoint import EndpointOptions
from ballast.guardrails.engines.request import Failure, Retry, post
from ballast.guardrails.engines.server_pool import Lease, ServerPool
from ballast.guardrails.engines.server_state import Server

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
R = TypeVar("R")

_ROWS_IN_A_ROW = 5


@dataclass(frozen=True)
class Unanswered:
    """A request that has no usable answer.

    Attributes:
        reason: what happened, without any text that was sent or received.
        wrong: whether a server did answer, but not so that it can be used.
    """

    reason: str
    wrong: bool = False


@dataclass(frozen=True)
class Trial:
    """What a server that was left out must answer before it gets requests again.

    Attributes:
        body: a request whose answer is known.
        accept: raises `BadAnswerError` or pydantic's `ValidationError` for another answer than that.
    """

    body: Mapping[str, Any]
    accept: Callable[[bytes], None]


@dataclass(frozen=True)
class _Failed:
    """A request that was sent, to one server or to two, without a usable answer."""

    by: dict[Server, Failure]


class Call(Generic[T]):
    """One call under way: what its requests know of one another.

    Args:
        client: sends the requests; the call's own.
        pool: orders the places at the servers.
        servers: those of the pool that may be asked.
        path: what follows the address.
        options: how patient to be.
        read: makes a result of an answer's bytes and the request's number.
        trial: what a server that was left out must answer first; None takes the request itself.
    """

    def __init__(
        self,
        client: "httpx.AsyncClient",
        pool: ServerPool,
        servers: Sequence[Server],
        path: str,
        options: EndpointOptions,
        read: Callable[[bytes, int], T],
        trial: Trial | None = None,
    ) -> None:
        self._client, self._pool, self._servers, self._path = client, pool, servers, path
        self._options, self._read, self._trial = options, read, trial
        self._patience = (2 * options.retries + 1) * options.timeout_s
        self._ends = time.monotonic() + self._patience
        self._failed_in_a_row = 0
        # Of its own, so that waiting does not change what a seeded training draws next.
        self._random = random.Random()

    async def run(self, bodies: Sequence[Mapping[str, Any]]) -> list[T | Unanswered]:
        """(N,) the answers, in the order of the bodies."""
        results: list[T | Unanswered] = [Unanswered("not sent")] * len(bodies)
        waiting = iter(enumerate(bodies))

        async def worker() -> None:
            for number, body in waiting:
                results[number] = await self._one(number, body)

        places = self._options.connections * len(self._servers)
        await asyncio.gather(*(worker() for _ in range(min(places, len(bodies)))))
        return results

    async def _one(self, number: int, body: Mapping[str, Any]) -> T | Unanswered:
        failed: dict[Server, Failure] = {}
        attempts = waits = 0
        while True:
            async with self._pool.place(self._servers, failed, self._left) as lease:
                if lease is None:
                    return Unanswered(f"{self._said(failed)}; nothing was answered for {self._patience:.3g} s")
                outcome = await self._race(lease, number, body)
            if not isinstance(outcome, _Failed):
                self._alive()
                return outcome
            failed |= outcome.by
            # A server out of use that fails its trial says nothing about a request that others can answer.
            counted = [f for server, f in outcome.by.items() if not (lease.on_trial and server is lease.server)]
            attempts += len(counted)
            elsewhere = self._pool.has_other(self._servers, failed)
            if not self._may_try_again(counted, attempts, elsewhere):
                return self._give_up(counted, failed, attempts)
            if not elsewhere:
                backoff = min(self._options.backoff_s * 2**waits, self._options.timeout_s)
                waits += 1
                await asyncio.sleep(max(0.0, min(backoff * self._random.uniform(0.5, 1.0), self._left())))

    def _may_try_again(self, failures: Sequence[Failure], attempts: int, elsewhere: bool) -> bool:
        kinds = {failure.retry for failure in failures}
        if Retry.NO_ONE in kinds or attempts > self._options.retries:
            return False
        return elsewhere or (Retry.ELSEWHERE not in kinds and self._failed_in_a_row < _ROWS_IN_A_ROW)

    def _give_up(self, last: Sequence[Failure], failed: Mapping[Server, Failure], attempts: int) -> Unanswered:
        wrong = any(failure.retry is not Retry.ANYONE for failure in last)
        if wrong:  # a server that answers is not down, whatever it answers
            self._alive()
        else:
            self._failed_in_a_row += 1
        return Unanswered(f"{self._said(failed)} ({attempts} attempt{'' if attempts == 1 else 's'})", wrong)

    def _alive(self) -> None:
        self._failed_in_a_row = 0
        self._ends = time.monotonic() + self._patience

    def _left(self) -> float:
        return self._ends - time.monotonic()

    def _said(self, failed: Mapping[Server, Failure]) -> str:
        said = [f"{server.address} {failure.reason}" for server, failure in failed.items()]
        return "; ".join(said) or f"{', '.join(server.address for server in self._servers)} had no place free"

    async def _race(self, lease: Lease, number: int, body: Mapping[str, Any]) -> T | _Failed:
        """The first usable answer, of the server of the lease or, where that takes long, of a second one."""
        began = time.monotonic()
        first: asyncio.Task[tuple[Server, T | Failure | None]]
        first = asyncio.create_task(self._attempt(lease, number, body))
        pending = {first}
        by: dict[Server, Failure] = {}
        try:
            after = self._pool.hedge_after(lease, self._servers)
            while after is not None and len(pending) == 1:
                await asyncio.wait(pending, timeout=after)
                if first.done():
                    break
                if self._pool.begin_hedge(lease, self._servers):
                    pending.add(asyncio.create_task(self._hedge(lease, number, body)))
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: task is not first):
                    server, outcome = task.result()
                    if isinstance(outcome, Failure):
                        by[server] = outcome
                    elif outcome is not None:
                        if not first.done():
                            self._pool.lost(lease, time.monotonic() - began)
                        return outcome
            return _Failed(by)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _hedge(self, lease: Lease, number: int, body: Mapping[str, Any]) -> tuple[Server, T | Failure | None]:
        """The same request at another server; None where there was no place in time."""
        async with self._pool.place(self._servers, (lease.server,), self._left, hedge=True) as other:
            if other is None:
                return lease.server, None
            self._pool.hedged(lease)
            return await self._attempt(other, number, body)

    async def _attempt(self, lease: Lease, number: int, body: Mapping[str, Any]) -> tuple[Server, T | Failure | None]:
        """The answer of a leased server. One that was left out proves itself first."""
        if lease.out and self._trial is not None:
            proof = await self._send(lease, self._trial.body, self._trial.accept)
            if isinstance(proof, Failure):
                return lease.server, proof
        return lease.server, await self._send(lease, body, partial(self._numbered, number))

    def _numbered(self, number: int, content: bytes) -> T:
        return self._read(content, number)

    async def _send(self, lease: Lease, body: Mapping[str, Any], read: Callable[[bytes], R]) -> R | Failure:
        self._pool.sent(lease)
        began = time.monotonic()
        outcome = await post(self._client, lease.server.address + self._path, body, read, self._options.timeout_s)
        if not isinstance(outcome, Failure):
            self._pool.answered(lease, time.monotonic() - began)
        elif outcome.retry is Retry.NO_ONE:
            self._pool.answered(lease, None)
        else:
            self._pool.failed(lease, outcome)
        return outcome
