"""One JSON request to one server: its answer, or what went wrong and who can be asked again.

Nothing is invented: what the server did not say in full, or said in a form that does not fit, is a `Failure`.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

_LARGEST_ANSWER = 4 * 2**20  # bytes; a verdict or a moderation takes a few thousand
_RETRIED = (408, 429)  # and every 5xx
_OF_THE_ROW = (400, 413, 422)  # about what was sent, so that every server of the model would say the same
_REMEDY = {
    400: "; the text may be longer than the server's model reads",
    401: "; set api_key_env to the environment variable that holds a valid key",
    403: "; set api_key_env to the environment variable that holds a key which may do this",
    404: "; check base_url, which ends in /v1 for most servers, and model",
}


class BadAnswerError(ValueError):
    """What the server sent cannot be trusted; raised by whoever reads an answer."""


class Retry(Enum):
    """Who can be asked after a failure."""

    ANYONE = "this server, later, or another one"
    ELSEWHERE = "another server: this one would say the same again"
    NO_ONE = "nobody: it is about the request"


@dataclass(frozen=True)
class Failure:
    """An attempt without a usable answer.

    Attributes:
        reason: what happened, without any text that was sent or received.
        retry: who can be asked instead.
        retry_after_s: how long the server asks to be left alone, in seconds.
    """

    reason: str
    retry: Retry
    retry_after_s: float = 0.0


async def post(
    client: "httpx.AsyncClient", url: str, body: Mapping[str, Any], read: Callable[[bytes], T], timeout_s: float
) -> T | Failure:
    """Post a body and read the answer.

    Args:
        client: sends it.
        url: where to.
        body: what to send as JSON.
        read: makes a result of an answer's bytes; raises `BadAnswerError` or pydantic's `ValidationError` for an
            answer that cannot be trusted.
        timeout_s: longest time from connecting to the last byte.
    """
    import httpx

    try:
        # httpx bounds each read, so a server that sends a byte at a time needs a bound on the whole, too.
        async with asyncio.timeout(timeout_s), client.stream("POST", url, json=body) as response:
            if not response.is_success:
                return _refused(response, timeout_s)
            return read(await _content(response))
    except (TimeoutError, httpx.TimeoutException):
        return Failure(f"did not answer within {timeout_s:g} s", Retry.ANYONE)
    except httpx.ConnectError:
        return Failure("cannot be reached", Retry.ANYONE)
    except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
        return Failure(f"cannot be asked ({type(error).__name__})", Retry.ELSEWHERE)
    except httpx.TransportError as error:
        return Failure(f"broke off the connection ({type(error).__name__})", Retry.ANYONE)
    except httpx.DecodingError:
        return Failure("sent an answer whose compression is broken", Retry.ELSEWHERE)
    except ValidationError as error:
        return Failure(f"sent an answer that does not fit ({_first(error)})", Retry.ELSEWHERE)
    except BadAnswerError as error:
        return Failure(f"sent an answer that cannot be used: {error}", Retry.ELSEWHERE)


def _refused(response: "httpx.Response", timeout_s: float) -> Failure:
    status = response.status_code
    # The body is not quoted: servers repeat in it what they were sent.
    what = f"answered HTTP {status} {response.reason_phrase}".rstrip()
    if status in _RETRIED or status >= 500:
        asked = _retry_after(response.headers.get("Retry-After", ""))
        return Failure(what, Retry.ANYONE, min(asked, timeout_s))
    return Failure(what + _REMEDY.get(status, ""), Retry.NO_ONE if status in _OF_THE_ROW else Retry.ELSEWHERE)


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
