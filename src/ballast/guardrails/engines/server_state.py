"""What is known of one server: what it is doing, how it has done, and whether it is left out for now.

A server is left out once `FAILURES_IN_A_ROW` of its requests in a row have failed, or were answered sooner by another
server. After `SHORTEST_OUTAGE_S` it is tried by one request. That it answers brings it back; that it fails leaves it
out for twice as long, up to `LONGEST_OUTAGE_S`.
"""

import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

FAILURES_IN_A_ROW = 3
SHORTEST_OUTAGE_S = 1.0
LONGEST_OUTAGE_S = 10.0
_RECENT = 128  # answers whose times are kept


@dataclass(frozen=True)
class ServerHealth:
    """One server's figures since the process began.

    Attributes:
        address: up to and including the version.
        state: `in use`, or `left out` until it has answered a trial.
        requests: requests sent to it, trials and hedges among them.
        failures: those without a usable answer.
        hedged: those that were sent to another server as well, since this one took long.
        lost: those of them that the other one answered first.
        under_way: requests at it now.
        median_s: median time of its recent answers, in seconds; None before the first.
        reason: why its last request failed or was lost; None before the first.
    """

    address: str
    state: Literal["in use", "left out"]
    requests: int
    failures: int
    hedged: int
    lost: int
    under_way: int
    median_s: float | None
    reason: str | None


@dataclass(eq=False)
class Server:
    """The state of one server. Whoever holds one orders the access to it; `ServerPool` does, by its lock."""

    address: str
    out: bool = False
    trying: bool = False
    under_way: int = 0
    last_turn: int = 0
    failed_in_a_row: int = 0
    paused_until: float = 0.0  # time.monotonic(), as below
    out_until: float = 0.0
    requests: int = 0
    failures: int = 0
    hedged: int = 0
    lost: int = 0
    reason: str | None = None
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _outages: int = 0

    def due(self) -> bool:
        """Whether it is left out and may be tried now."""
        return self.out and not self.trying and self.out_until <= time.monotonic()

    def paused(self) -> bool:
        """Whether it has asked to be left alone for now."""
        return self.paused_until > time.monotonic()

    def changes_in(self) -> float:
        """Seconds until a pause or an outage is over; infinite where neither is."""
        left = [end - time.monotonic() for end in (self.paused_until, self.out_until if self.out else 0.0)]
        return min((seconds for seconds in left if seconds > 0), default=float("inf"))

    def bring_back(self) -> bool:
        """Take it into use again; whether it was left out."""
        was_out, self.out, self._outages = self.out, False, 0
        return was_out

    def leave_out(self) -> float:
        """Leave it out, for longer each time in a row; the seconds."""
        seconds = min(SHORTEST_OUTAGE_S * 2**self._outages, LONGEST_OUTAGE_S)
        self.out, self.out_until = True, time.monotonic() + seconds
        self._outages = min(self._outages + 1, 30)
        return seconds

    def health(self) -> ServerHealth:
        """The figures as they are now."""
        return ServerHealth(
            self.address,
            "left out" if self.out else "in use",
            self.requests,
            self.failures,
            self.hedged,
            self.lost,
            self.under_way,
            statistics.median(self.times) if self.times else None,
            self.reason,
        )
