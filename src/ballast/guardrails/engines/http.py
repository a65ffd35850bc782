"""Many JSON requests to one server that may be down, slow or wrong: each gets an answer, or a reason why not.

No request costs another one its answer, and nothing is invented: what the server did not say is `Unanswered`.

* Connection errors, time-outs, 408, 429 and 5xx are tried again after `backoff_s * 2**n` seconds, less a random
  part; `Retry-After` is obeyed, by all requests of the call, up to `timeout_s`. Other statuses, and answers that
  do not fit, are final.
* Once `_ROWS_IN_A_ROW` requests in a row have failed for good, the server counts as down: requests are tried once
  and not again, until one is answered. So a batch sent to a dead server ends soon, and one request that a server
  chokes on loses no others.
* No wait and no attempt is longer than `timeout_s`, so one request takes at most `(2 * retries + 1) * timeout_s`.
  That is also the call's patience: after so long without any answer, every request that is left is unanswered.
"""

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError

from ballast.errors import ConfigError

if TYPE_CHECKING:
    import httpx

_log = logging.getLogger(__name__)

T = TypeVar("T")

_ROWS_IN_A_ROW = 5
_LARGEST_ANSWER = 4 * 2**20  # bytes; a verdict or a moderation takes a few thousand
_RETRIED = (408, 429)  # and every 5xx
_CONNECT_S = 5.0
_REMEDY = {
    400: "; the text may be longer than the server's model reads",
    401: "; set api_key_env to the environment variable that holds a valid key",
    403: "; set api_key_env to the environment variable that holds a key which may do this",
    404: "; check base_url, which ends in /v1 for most servers, and model",
}


class EndpointOptions(Protocol):
    """What the options of a remote guard or engine say about its server."""

    @property
    def base_url(self) -> str:
        """Address up to and including `/v1`."""

    @property
    def api_key_env(self) -> str | None:
        """Name of the environment variable that holds the key; None sends none."""

    @property
    def connections(self) -> int:
        """Requests in flight at the same time."""

    @property
    def timeout_s(self) -> float:
        """Longest attempt, from connecting to the last byte, in seconds."""

    @property
    def retries(self) -> int:
        """Attempts after the first."""

    @property
    def backoff_s(self) -> float:
        """Wait before the first of them, in seconds; doubled for each further one."""


@dataclass(frozen=True)
class Unanswered:
    """A request that has no usable answer.

    Attributes:
        reason: what happened, without any text that was sent or received.
    """

    reason: str


class BadAnswerError(ValueError):
    """What the server sent cannot be trusted; raised by the `read` of `JsonClient.post_all`."""


class JsonClient:
    """Posts JSON to one server, many requests at a time. Holds no connection between calls.

    Args:
        options: the server and how patient to be with it.
        guard: the guard's name, for messages.

    Raises:
        ConfigError: `base_url` is no http address or holds a password, or the variable named by `api_key_env` is not set.
    """

    def __init__(self, options: EndpointOptions, *, guard: str) -> None:
        self._options, self._guard = options, guard
        self._base = options.base_url.rstrip("/")
        self._check_address(guard)
        self._headers: dict[str, str] = {}
        if options.api_key_env is not None:
            key = os.environ.get(options.api_key_env, "").strip()
            if not key.isascii() or not key.isprintable() or not key:
                raise ConfigError(
                    f"guardrail '{guard}': api_key_env names the environment variable {options.api_key_env}, which is "
                    "not set or holds what cannot be a key; export it, or set api_key_env to null for a server that asks for none"
                )
            self._headers["Authorization"] = f"Bearer {key}"

    def _check_address(self, guard: str) -> None:
        """Refuse what is no address, and one with a password in it: addresses are logged and kept with the run."""
        try:
            parts = urlsplit(self._base)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if "@" in self._base:
            raise ConfigError(
                f"guardrail '{guard}': base_url holds a user name or password (an @); put the key into an environment "
                "variable and name that in api_key_env"
            )
        if not sound:
            raise ConfigError(
                f"guardrail '{guard}': base_url is '{self._base}', which is no http address; write it like http://localhost:8000/v1"
            )

    def post_all(
        self, path: str, bodies: Sequence[Mapping[str, Any]], read: Callable[[bytes, int], T]
    ) -> list[T | Unanswered]:
        """Post every body and read every answer.

        Args:
            path: what follows `base_url`, with its slash.
            bodies: (N,) what to send as JSON.
            read: makes a result of an answer's bytes and the request's number; raises `BadAnswerError` or pydantic's
                `ValidationError` for an answer that cannot be trusted.

        Returns:
            (N,) results in the order of `bodies`; `Unanswered` for a request without a usable answer.
        """
        answers = _finish(self._post_all(path, bodies, read)) if bodies else []
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

    async def _post_all(
        self, path: str, bodies: Sequence[Mapping[str, Any]], read: Callable[[bytes, int], T]
    ) -> list[T | Unanswered]:
        import httpx

        options = self._options
        async with httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(options.timeout_s, connect=min(options.timeout_s, _CONNECT_S), pool=None),
            limits=httpx.Limits(max_connections=options.connections),
        ) as client:
            call = _Call(client, self._base, path, options, read)
            return await call.run(bodies)


@dataclass(frozen=True)
class _Failure:
    """An attempt that may be made again."""

    reason: str
    retry_after_s: float = 0.0


class _Call(Generic[T]):
    """One `post_all` under way: what its requests know of one another."""

    def __init__(
        self,
        client: "httpx.AsyncClient",
        address: str,
        path: str,
        options: EndpointOptions,
        read: Callable[[bytes, int], T],
    ) -> None:
        self._client, self._url, self._address = client, address + path, address
        self._options, self._read = options, read
        self._patience = (2 * options.retries + 1) * options.timeout_s
        self._ends = time.monotonic() + self._patience
        self._paused_until = 0.0
        self._failed_in_a_row = 0
        # Of its own, so that waiting does not change what a seeded training draws next.
        self._random = random.Random()

    async def run(self, bodies: Sequence[Mapping[str, Any]]) -> list[T | Unanswered]:
        results: list[T | Unanswered] = [Unanswered("not sent")] * len(bodies)
        waiting = iter(enumerate(bodies))

        async def connection() -> None:
            for number, body in waiting:
                results[number] = await self._one(number, body)

        await asyncio.gather(*(connection() for _ in range(min(self._options.connections, len(bodies)))))
        return results

    async def _one(self, number: int, body: Mapping[str, Any]) -> T | Unanswered:
        reason, attempts = "was not asked again", 0
        while await self._may_try():
            outcome = await self._attempt(number, body)
            attempts += 1
            if not isinstance(outcome, _Failure):
                self._failed_in_a_row = 0
                self._ends = time.monotonic() + self._patience
                return outcome
            reason = outcome.reason
            if outcome.retry_after_s:
                self._paused_until = max(self._paused_until, time.monotonic() + outcome.retry_after_s)
            if attempts > self._options.retries or self._failed_in_a_row >= _ROWS_IN_A_ROW:
                self._failed_in_a_row += 1
                return Unanswered(f"{self._address} {reason} ({attempts} attempt{'s' if attempts > 1 else ''})")
            backoff = min(self._options.backoff_s * 2 ** (attempts - 1), self._options.timeout_s)
            await self._sleep(backoff * self._random.uniform(0.5, 1.0))
        return Unanswered(f"{self._address} {reason}; it has answered nothing for {self._patience:.3g} s")

    async def _may_try(self) -> bool:
        """Wait out a pause that the server asked for; false once the call's patience is at its end."""
        while (pause := self._paused_until - time.monotonic()) > 0 and self._left() > 0:
            await self._sleep(pause)
        return self._left() > 0

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, min(seconds, self._left())))

    def _left(self) -> float:
        return self._ends - time.monotonic()

    async def _attempt(self, number: int, body: Mapping[str, Any]) -> T | Unanswered | _Failure:
        import httpx

        try:
            # httpx bounds each read, so a server that sends a byte at a time needs a bound on the whole, too.
            async with (
                asyncio.timeout(self._options.timeout_s),
                self._client.stream("POST", self._url, json=body) as response,
            ):
                if not response.is_success:
                    return self._refused(response)
                return self._read(await _content(response), number)
        except (TimeoutError, httpx.TimeoutException):
            return _Failure(f"did not answer within {self._options.timeout_s:g} s")
        except httpx.ConnectError:
            return _Failure("cannot be reached")
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            return Unanswered(f"{self._address} cannot be asked ({type(error).__name__})")
        except httpx.TransportError as error:
            return _Failure(f"broke off the connection ({type(error).__name__})")
        except httpx.DecodingError:
            return Unanswered(f"{self._address} sent an answer whose compression is broken")
        except ValidationError as error:
            return Unanswered(f"{self._address} sent an answer that does not fit ({_first(error)})")
        except BadAnswerError as error:
            return Unanswered(f"{self._address} sent an answer that cannot be used: {error}")

    def _refused(self, response: "httpx.Response") -> Unanswered | _Failure:
        status = response.status_code
        what = f"answered HTTP {status} {response.reason_phrase}".rstrip()
        if status in _RETRIED or status >= 500:
            asked = _retry_after(response.headers.get("Retry-After", ""))
            return _Failure(what, min(asked, self._options.timeout_s))
        # The body is not quoted: servers repeat in it what they were sent.
        return Unanswered(f"{self._address} {what}{_REMEDY.get(status, '')}")


async def _content(response: "httpx.Response") -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > _LARGEST_ANSWER:
            raise BadAnswerError(f"it is larger than {_LARGEST_ANSWER} bytes")
    return bytes(content)


def _retry_after(header: str) -> float:
    """Seconds that a `Retry-After` header asks for (RFC 9110, 10.2.3); 0 where it cannot be read."""
    if header.isascii() and header.isdecimal():
        return float(header)
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return max(0.0, (until - datetime.now(UTC)).total_seconds()) if until.tzinfo else 0.0


def _first(error: ValidationError) -> str:
    """The first problem by its place and kind; never the value, which may be anything."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part)[:40] for part in problem["loc"])
    return f"{place}: {problem['type']}" if place else problem["type"]


def _finish(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in a thread of its own where this one already runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
