"""Many JSON requests to servers that may be down, slow or wrong: each gets an answer, or a reason why not.

No request costs another one its answer, and nothing is invented: what no server said is `Unanswered`. `call` says who
is asked again and when a call gives up, `server_pool` which server is asked.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from ballast.guardrails.engines.call import Call, Trial, Unanswered
from ballast.guardrails.engines.endpoint import EndpointOptions, authorization, check_addresses
from ballast.guardrails.engines.server_pool import ServerPool
from ballast.guardrails.engines.server_state import ServerHealth

if TYPE_CHECKING:
    import ssl

    import httpx

_log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECT_S = 5.0


class JsonClient:
    """Posts JSON to one server, or to several of a kind, many requests at a time. Holds no connection between calls.

    Args:
        options: the servers and how patient to be with them.
        guard: the guard's name, for messages.

    Raises:
        ConfigError: an address is no http address, is there twice or holds a password, or the variable named by
            `api_key_env` is not set.
    """

    def __init__(self, options: EndpointOptions, *, guard: str) -> None:
        self._options, self._guard = options, guard
        check_addresses(options.addresses, guard)
        self._headers = authorization(options.api_key_env, guard)
        self._pool = ServerPool(options.addresses, options.connections, options.hedge_quantile, guard)

    def health(self) -> tuple[ServerHealth, ...]:
        """(S,) what is known of each server."""
        return self._pool.health()

    def leave_out(self, address: str) -> None:
        """Send a server nothing until it has answered a trial."""
        self._pool.leave_out(next(server for server in self._pool.servers if server.address == address))

    def post_all(
        self,
        path: str,
        bodies: Sequence[Mapping[str, Any]],
        read: Callable[[bytes, int], T],
        trial: Trial | None = None,
    ) -> list[T | Unanswered]:
        """Have every body answered by some server.

        Args:
            path: what follows the address, with its slash.
            bodies: (N,) what to send as JSON.
            read: makes a result of an answer's bytes and the request's number; raises `BadAnswerError` or pydantic's
                `ValidationError` for an answer that cannot be trusted.
            trial: what a server that was left out must answer first; None takes the request itself.

        Returns:
            (N,) results in the order of `bodies`; `Unanswered` for a request without a usable answer.
        """
        if not bodies:
            return []

        async def work() -> list[T | Unanswered]:
            async with self._client() as client:
                servers = self._pool.servers
                return await Call(client, self._pool, servers, path, self._options, read, trial).run(bodies)

        answers = _finish(work())
        reasons = Counter(answer.reason for answer in answers if isinstance(answer, Unanswered))
        for reason, count in reasons.most_common(1):
            _log.warning(
                "%s: %d of %d requests have no usable answer, so what they asked about is unscored; %d of them: %s",
                self._guard,
                reasons.total(),
                len(answers),
                count,
                reason,
            )
        return answers

    def post_each(
        self, path: str, bodies: Sequence[Mapping[str, Any]], read: Callable[[bytes, int], T]
    ) -> dict[str, list[T | Unanswered]]:
        """Have every body answered by every server that is in use; each is asked once. See `post_all`.

        Returns:
            (N,) results in the order of `bodies`, by address.
        """
        once = self._options.model_copy(update={"retries": 0})
        servers = [server for server in self._pool.servers if not server.out]

        async def work() -> list[list[T | Unanswered]]:
            async with self._client() as client:
                calls = [Call(client, self._pool, (server,), path, once, read) for server in servers]
                return await asyncio.gather(*(call.run(bodies) for call in calls))

        return dict(zip((server.address for server in servers), _finish(work()), strict=True))

    @cached_property
    def _trusted(self) -> "ssl.SSLContext":
        """The certificates, read once: that takes longer than a request."""
        import httpx

        return httpx.create_ssl_context()

    def _client(self) -> "httpx.AsyncClient":
        import httpx

        timeout_s = self._options.timeout_s
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S), pool=None),
            limits=httpx.Limits(max_connections=None),  # the pool of servers bounds them, over all calls
            verify=self._trusted,
        )


def _finish(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in a thread of its own where this one already runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
