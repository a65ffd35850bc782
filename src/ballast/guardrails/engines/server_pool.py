"""The servers of a guard: who is asked next, how many at a time, and who is left out.

* At most `connections` requests are under way at a server, from all calls and threads together. Who finds no free
  place waits for one, in the order of asking, so that work piles up here and not at a server.
* A request goes to the server with the fewest under way that it has not failed at yet.
* A server that is left out (see `server_state`) gets one request at a time for trial. Where all are left out, all
  are asked: a wrong guess about them must not cost rows that one of them would answer.
* A request that takes long may be sent to a second server too (a hedge; Dean and Barroso, "The Tail at Scale", 2013).
  Where a place is free that costs nobody anything. Hedges for which others must wait are few, `_HEDGES_AT_ONCE` in a
  burst and one in `1 / _HEDGE_SHARE` requests after it, so that servers which are all slow do not get twice the work.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from ballast.guardrails.engines.request import Failure
from ballast.guardrails.engines.server_state import FAILURES_IN_A_ROW, Server, ServerHealth

_log = logging.getLogger(__name__)

_RECENT = 256  # answers, of all servers, that the hedge's quantile is taken of
_FEWEST = 20  # of them before anything is hedged
_HEDGES_AT_ONCE = 10.0
_HEDGE_SHARE = 0.1
_SHORTEST_S = 0.005  # before a hedge; below it times are noise


@dataclass(frozen=True)
class Lease:
    """A place at a server.

    Attributes:
        server: where.
        out: whether the server was left out at that time, so that it must prove itself first.
        on_trial: whether it was, while others were in use.
    """

    server: Server
    out: bool
    on_trial: bool


@dataclass(eq=False)
class _Waiter:
    """A request that waits for a place, in the event loop of its own call."""

    servers: Sequence[Server]
    avoid: Collection[Server]
    hedge: bool
    loop: asyncio.AbstractEventLoop
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    lease: Lease | None = None


class ServerPool:
    """The servers of one guard. Calls come from any thread and event loop.

    Args:
        addresses: (S,) the servers.
        connections: requests under way at one server.
        hedge_quantile: in [0, 1); quantile of recent times after which a request may be hedged; 0 never.
        guard: the guard's name, for messages.
    """

    def __init__(self, addresses: Sequence[str], connections: int, hedge_quantile: float, guard: str) -> None:
        self.servers = tuple(Server(address) for address in addresses)
        self._connections, self._quantile, self._guard = connections, hedge_quantile, guard
        self._lock = threading.Lock()
        self._waiting: deque[_Waiter] = deque()
        self._times: deque[float] = deque(maxlen=_RECENT)
        self._hedges_left = _HEDGES_AT_ONCE
        self._turn = 0

    @asynccontextmanager
    async def place(
        self,
        servers: Sequence[Server],
        avoid: Collection[Server],
        left: Callable[[], float],
        *,
        hedge: bool = False,
    ) -> AsyncIterator[Lease | None]:
        """A place at one of `servers` for the time of the block, waited for while `left()` seconds are above 0.

        Args:
            servers: who may be asked.
            avoid: who is asked only where nobody else is in use.
            left: how many seconds the caller would still wait.
            hedge: the request is at one of `avoid` already, so that only others that are in use will do.

        Yields:
            None where there was none in time.
        """
        lease = await self._take(servers, frozenset(avoid), left, hedge)
        try:
            yield lease
        finally:
            if lease is not None:
                self._give_back(lease)

    async def _take(
        self, servers: Sequence[Server], avoid: Collection[Server], left: Callable[[], float], hedge: bool
    ) -> Lease | None:
        if left() <= 0:
            return None
        waiter = _Waiter(servers, avoid, hedge, asyncio.get_running_loop())
        with self._lock:
            waiter.lease = self._choose(waiter)
            if waiter.lease is not None:
                return waiter.lease
            self._waiting.append(waiter)
        try:
            while not waiter.granted.is_set() and (patience := left()) > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(patience, self._changes_in(servers))):
                        await waiter.granted.wait()
                with self._lock:
                    self._grant()  # an outage or a pause may be over, of which nobody tells
        except BaseException:
            self._withdraw(waiter)
            if waiter.lease is not None:
                self._give_back(waiter.lease)
            raise
        self._withdraw(waiter)
        return waiter.lease

    def _withdraw(self, waiter: _Waiter) -> None:
        with self._lock, suppress(ValueError):  # it is not there once it was granted a place
            self._waiting.remove(waiter)

    def _changes_in(self, servers: Sequence[Server]) -> float:
        with self._lock:
            return min(server.changes_in() for server in servers)

    def _give_back(self, lease: Lease) -> None:
        with self._lock:
            lease.server.under_way -= 1
            if lease.out:
                lease.server.trying = False
            self._grant()

    def _grant(self) -> None:
        """Hand free places to those who wait, the first first. Handed over and not thrown open: else a call that asks
        again at once would always be before those of other threads."""
        for waiter in list(self._waiting):
            if (lease := self._choose(waiter)) is not None:
                waiter.lease = lease
                self._waiting.remove(waiter)
                waiter.loop.call_soon_threadsafe(waiter.granted.set)

    def _choose(self, waiter: _Waiter) -> Lease | None:
        in_use = [server for server in waiter.servers if not server.out]
        free = {s for s in waiter.servers if s.under_way < self._connections and not s.paused()}
        fresh = [server for server in in_use if server not in waiter.avoid]
        if waiter.hedge:
            candidates = fresh
        elif in_use:
            due = [
                server for server in waiter.servers if server in free and server.due() and server not in waiter.avoid
            ]
            candidates = due or fresh or in_use
        else:
            candidates = list(waiter.servers)
        chosen = min(
            (server for server in candidates if server in free),
            key=lambda s: (s in waiter.avoid, s.failed_in_a_row if s.out else 0, s.under_way, s.last_turn),
            default=None,
        )
        if chosen is None:
            return None
        self._turn += 1
        chosen.last_turn = self._turn
        chosen.under_way += 1
        chosen.trying |= chosen.out
        return Lease(chosen, chosen.out, on_trial=chosen.out and bool(in_use))

    def has_other(self, servers: Sequence[Server], tried: Collection[Server]) -> bool:
        """Whether a request that failed at `tried` can go elsewhere at once."""
        with self._lock:
            usable = [server for server in servers if not server.out] or servers
            return any(server not in tried for server in usable)

    def sent(self, lease: Lease) -> None:
        """A request leaves."""
        with self._lock:
            lease.server.requests += 1
            self._hedges_left = min(self._hedges_left + _HEDGE_SHARE, _HEDGES_AT_ONCE)

    def answered(self, lease: Lease, seconds: float | None) -> None:
        """It was answered, in a time that says something about the server, or None; or refused for what it is."""
        with self._lock:
            server = lease.server
            server.failed_in_a_row = 0
            if seconds is not None:
                server.times.append(seconds)
                self._times.append(seconds)
            if lease.out and server.bring_back():
                _log.info("%s: %s answers again and is in use", self._guard, server.address)
                self._grant()

    def failed(self, lease: Lease, failure: Failure) -> None:
        """It was not answered, or not so that it could be used."""
        with self._lock:
            server = lease.server
            server.failures += 1
            server.paused_until = max(server.paused_until, time.monotonic() + failure.retry_after_s)
            self._counts_against(lease, failure.reason)

    def hedge_after(self, lease: Lease, servers: Sequence[Server]) -> float | None:
        """Seconds after which this request may be hedged, and after which to ask again; None for not at all."""
        with self._lock:
            others = any(not server.out and server is not lease.server for server in servers)
            if not self._quantile or not others or len(self._times) < _FEWEST:
                return None
            return max(_SHORTEST_S, sorted(self._times)[int(self._quantile * len(self._times))])

    def begin_hedge(self, lease: Lease, servers: Sequence[Server]) -> bool:
        """Whether this request may be hedged now."""
        with self._lock:
            others = [server for server in servers if not server.out and server is not lease.server]
            idle = not self._waiting and any(server.under_way < self._connections for server in others)
            if not others or not (idle or self._hedges_left >= 1):
                return False
            self._hedges_left -= not idle
            return True

    def hedged(self, lease: Lease) -> None:
        """A second server is asked too."""
        with self._lock:
            lease.server.hedged += 1

    def lost(self, lease: Lease, seconds: float) -> None:
        """Another server answered a request first, which this one had for so many seconds."""
        with self._lock:
            lease.server.lost += 1
            # At least so long: without these the quantile would forget whatever is slow.
            lease.server.times.append(seconds)
            self._times.append(seconds)
            self._counts_against(lease, "was slower than another server")

    def leave_out(self, server: Server) -> None:
        """Take a server out of use until it has answered a trial."""
        with self._lock:
            if not server.out:
                server.leave_out()
                self._grant()

    def health(self) -> tuple[ServerHealth, ...]:
        """(S,) the figures of every server."""
        with self._lock:
            return tuple(server.health() for server in self.servers)

    def _counts_against(self, lease: Lease, reason: str) -> None:
        server = lease.server
        server.reason = reason
        server.failed_in_a_row += 1
        if server.out:
            # What was sent before an outage and fails in it says nothing new, nor does a second trial at that time.
            news = lease.out and server.out_until <= time.monotonic()
        else:
            news = server.failed_in_a_row >= FAILURES_IN_A_ROW
        if not news:
            return
        was_in_use, seconds = not server.out, server.leave_out()
        if was_in_use and len(self.servers) > 1:
            _log.warning(
                "%s: %s is left out for %g s after %d failures in a row, the last: it %s",
                self._guard,
                server.address,
                seconds,
                server.failed_in_a_row,
                reason,
            )
        self._grant()
