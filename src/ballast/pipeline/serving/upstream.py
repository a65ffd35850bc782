"""The model server behind the gateway: any that speaks OpenAI's protocol.

It is always asked to stream, whatever the client asked for, so that the guardrail can work while it writes and
the request can be broken off. Of its answers only the text, the reason of the end and the token counts are read.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ballast.errors import ConfigError
from ballast.pipeline.serving.problems import Problem
from ballast.pipeline.serving.requests import Ask

_CONNECT_S = 5.0
_LARGEST_EVENT = 1_048_576

Finish = Literal["stop", "length", "content_filter"]


class Usage(BaseModel):
    """Token counts of an answer."""

    model_config = ConfigDict(extra="ignore")

    prompt_tokens: int = Field(0, ge=0)
    completion_tokens: int = Field(0, ge=0)
    total_tokens: int = Field(0, ge=0)


@dataclass(frozen=True)
class Piece:
    """What one read of the model server's answer brought.

    Attributes:
        text: what it wrote, not yet judged.
        finish: why it stopped, once it has.
        usage: token counts, at the very end.
    """

    text: str = ""
    finish: Finish | None = None
    usage: Usage | None = None


class _Delta(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    index: Literal[0] = 0
    delta: _Delta = _Delta()
    text: str | None = None
    finish_reason: str | None = None


class _Event(BaseModel):
    choices: list[_Choice] = Field(default_factory=list, max_length=1)
    usage: Usage | None = None
    error: Any = None


class _Model(BaseModel):
    id: str
    created: int = 0
    owned_by: str = "ballast"


class _Models(BaseModel):
    data: list[_Model]


class Upstream:
    """A client of one model server.

    Args:
        url: its address, with or without /v1 at the end.
        timeout_s: seconds that it may be silent.
        key: its API key; None where it needs none.

    Raises:
        ConfigError: the address is no http address.
    """

    def __init__(self, url: str, timeout_s: float, key: str | None = None) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:  # such as a port that is no number
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(
                f"the model server's address '{url}' is no http address; write it like http://127.0.0.1:8000"
            )
        base = str(parsed).rstrip("/").removesuffix("/v1")
        # No proxy from the environment: what is not judged yet would travel through it.
        self._client = httpx.AsyncClient(
            base_url=base,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            trust_env=False,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def alive(self) -> bool:
        """Whether the server answers at all."""
        try:
            return (await self._client.get("/v1/models", timeout=_CONNECT_S)).is_success
        except httpx.HTTPError:
            return False

    async def models(self) -> list[dict[str, Any]]:
        """Its models, by id.

        Raises:
            Problem: 502 or 504; it cannot be reached, or answers what is no list of models.
        """
        try:
            response = await self._client.get("/v1/models", timeout=_CONNECT_S)
            if not response.is_success:
                raise _status(response.status_code)
            listed = _Models.model_validate_json(response.content).data
        except httpx.HTTPError as error:
            raise _transport(error) from None
        except ValidationError:
            raise _broken("its list of models cannot be read") from None
        return [{"object": "model", **model.model_dump()} for model in listed]

    @asynccontextmanager
    async def answer(self, ask: Ask) -> AsyncIterator[AsyncIterator[Piece]]:
        """The answer as it is written. Leaving the context closes the connection, which ends the generation.

        Raises:
            Problem: the server refused the request, cannot be reached, broke off, or sent what cannot be read.
        """
        try:
            async with self._client.stream("POST", ask.path, json=ask.body) as response:
                if not response.is_success:
                    raise _status(response.status_code)
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise _broken("it does not stream its answer")
                async with aclosing(_pieces(response)) as pieces:
                    yield pieces
        except httpx.HTTPError as error:
            raise _transport(error) from None


async def _pieces(response: httpx.Response) -> AsyncGenerator[Piece]:
    """One piece for each read, with everything that arrived; the last one has arrived when `[DONE]` has."""
    finished = False
    events = _Events()
    async for chunk in response.aiter_bytes():
        texts: list[str] = []
        finish, usage, done = None, None, False
        for data in events.feed(chunk):
            if data == b"[DONE]":
                done = True
                break
            event = _read(data)
            usage = event.usage or usage
            for choice in event.choices:
                if finished or finish is not None:
                    if choice.delta.content or choice.text:
                        raise _broken("it wrote on after the end of its answer")
                    continue
                texts.append(choice.delta.content or choice.text or "")
                finish = _finish(choice.finish_reason)
        if texts or usage or finish:
            yield Piece("".join(texts), finish, usage)
        finished = finished or finish is not None
        if done:
            break
    if not finished:
        raise Problem(502, "upstream_failed", "the model server broke off in the middle of the answer")


class _Events:
    """Server-sent events from bytes, by the rules of the HTML standard that the protocol uses."""

    def __init__(self) -> None:
        self._rest, self._data = b"", b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of all events that are complete by now."""
        # Not str.splitlines, which also splits at characters that may stand in a text.
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data += (b"\n" if self._data else b"") + line[5:].removeprefix(b" ")
            elif not line and self._data:
                events.append(self._data)
                self._data = b""
        if len(self._rest) + len(self._data) > _LARGEST_EVENT:
            raise _broken(f"one of its events is larger than {_LARGEST_EVENT} bytes")
        return events


def _read(data: bytes) -> _Event:
    try:
        event = _Event.model_validate_json(data)
    except ValidationError:
        raise _broken("one of its events cannot be read") from None
    if event.error is not None:
        raise Problem(502, "upstream_failed", "the model server failed while it wrote the answer")
    return event


def _finish(reason: str | None) -> Finish | None:
    match reason:
        case None | "":
            return None
        case "stop" | "length" | "content_filter":
            return reason
        case _:
            raise _broken("its answer ended for a reason that is none of stop, length and content_filter")


def _status(status: int) -> Problem:
    # Its message is not passed on: servers repeat in it what they were sent, and no guardrail has read it.
    if status == 404:
        return Problem(404, "model_not_found", "the model server has no such model", "model")
    if status == 429:
        return Problem(
            429, "rate_limit_exceeded", "the model server is busy; try again later", headers={"Retry-After": "1"}
        )
    if status in (400, 413, 422):
        return Problem(
            400,
            "refused_by_model_server",
            f"the model server refused the request (HTTP {status}); most likely prompt and max_tokens do not fit its context",
        )
    return Problem(502, "upstream_failed", f"the model server answered HTTP {status}")


def _transport(error: httpx.HTTPError) -> Problem:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Problem(502, "upstream_unreachable", "the model server cannot be reached; try again later")
    if isinstance(error, httpx.TimeoutException):
        return Problem(504, "upstream_timeout", "the model server was silent for too long")
    return Problem(502, "upstream_failed", "the model server broke off the connection")


def _broken(what: str) -> Problem:
    return Problem(502, "upstream_broken", f"the model server's answer cannot be used: {what}")
