"""Guards that ask servers: how those servers do, and what a step of the training cost them."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from ballast.guardrails.engines.server_state import ServerHealth


@runtime_checkable
class Remote(Protocol):
    """What asks servers, or holds something that does."""

    def servers(self) -> tuple[ServerHealth, ...]:
        """(S,) what is known of each server; none where nothing is asked of any."""
        ...


def servers_of(guard: object) -> tuple[ServerHealth, ...]:
    """(S,) the servers that a guard or an engine asks; none for one that asks none."""
    return guard.servers() if isinstance(guard, Remote) else ()


_LEFT_OUT = "guard/servers_left_out"


class ServerMeter:
    """What happened at a guard's servers from one reading to the next.

    Args:
        guard: any guard.
    """

    def __init__(self, guard: object) -> None:
        self._guard = guard
        self._before = _counts(servers_of(guard))

    def read(self) -> dict[str, float]:
        """Figures for the log, summed over the servers; empty for a guard that asks none.

        Returns:
            `guard/requests`, `guard/failed_requests` and `guard/hedges` since the last reading, and
            `guard/servers_left_out` now.
        """
        servers = servers_of(self._guard)
        if not servers:
            return {}
        before, self._before = self._before, _counts(servers)
        figures = {f"guard/{name}": float(count - before[name]) for name, count in self._before.items()}
        return {**figures, _LEFT_OUT: float(sum(server.state == "left out" for server in servers))}


def over_processes(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures of `ServerMeter.read` of several processes that ask the same servers: sums, and the most left out."""
    names = dict.fromkeys(name for of_one in figures for name in of_one)
    return {
        name: (max if name == _LEFT_OUT else sum)([of_one[name] for of_one in figures if name in of_one])
        for name in names
    }


def _counts(servers: tuple[ServerHealth, ...]) -> dict[str, int]:
    return {
        "requests": sum(server.requests for server in servers),
        "failed_requests": sum(server.failures for server in servers),
        "hedges": sum(server.hedged for server in servers),
    }
