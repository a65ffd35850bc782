"""A model server on this machine that plays a script, and a gateway in front of it, both over real sockets."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from ballast.pipeline.config_serve import ServeConfig
from ballast.pipeline.serving.app import create_app
from ballast.pipeline.serving.server import listen, server

KEY = "test-key"
_OWN = ("system_prompt", "default_system_prompt", "special_tokens", "models", "upstream_url")
HEADERS = {"Authorization": f"Bearer {KEY}"}


@dataclass(frozen=True)
class Wait:
    """Seconds of silence; cut short where the client leaves."""

    seconds: float


@dataclass(frozen=True)
class Raw:
    """Bytes as they are."""

    data: bytes


class Die:
    """The process is killed: the connection is reset."""


@dataclass
class Upstream:
    """What the server plays and what it saw.

    Attributes:
        script: texts, each a chunk of the answer, and `Wait`, `Raw` and `Die`.
        finish: the reason of the end; None ends without one.
        status: HTTP status; another one than 200 is answered with `refusal`.
        requests: path and body of each request for an answer.
        aborted: answers that the client left before their end.
        written: texts that were written.
    """

    script: Sequence[Any] = ("Hello", " there")
    finish: str | None = "stop"
    status: int = 200
    refusal: bytes = b'{"error": {"message": "secret words of the model server"}}'
    url: str = ""
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    aborted: int = 0
    open: int = 0
    written: list[str] = field(default_factory=list)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        path = head[0].split(" ")[1]
        self.paths.append(path)
        length = next((int(line.split(":")[1]) for line in head if line.lower().startswith("content-length")), 0)
        content = await reader.readexactly(length)
        if path == "/v1/models":
            _send(writer, 200, b'{"data": [{"id": "policy"}, {"id": "base", "root": "/secret"}]}')
            return True
        self.requests.append((path, json.loads(content)))
        if self.status != 200:
            _send(writer, self.status, self.refusal)
            return True
        self.open += 1
        try:
            return await self._stream(reader, writer, chat=path == "/v1/chat/completions")
        finally:
            self.open -= 1

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chat: bool) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        gone = asyncio.ensure_future(reader.read(1))  # a client that is there sends nothing now
        try:
            for step in self.script:
                if isinstance(step, Die):
                    writer.transport.abort()
                    return False
                if isinstance(step, Wait):
                    await asyncio.wait({gone}, timeout=step.seconds)
                if gone.done():
                    self.aborted += 1
                    return False
                if isinstance(step, Raw):
                    _chunk(writer, step.data)
                if isinstance(step, str):
                    self.written.append(step)
                    _event(writer, {"choices": [_choice(step, None, chat)]})
                await writer.drain()
            if self.finish is not None:
                _event(writer, {"choices": [_choice("", self.finish, chat)]})
                usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, "secret": "x"}
                _event(writer, {"choices": [], "usage": usage})
                _chunk(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
        except ConnectionError:
            self.aborted += 1
            raise
        finally:
            gone.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await gone
        return False


def _choice(text: str, finish: str | None, chat: bool) -> dict[str, Any]:
    content = {"delta": {"content": text, "reasoning_content": "unjudged thoughts"}} if chat else {"text": text}
    return {"index": 0, "finish_reason": finish, "logprobs": {"secret": text}, **content}


def _event(writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


def _send(writer: asyncio.StreamWriter, status: int, content: bytes) -> None:
    writer.write(
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        + content
    )


@dataclass
class Stage:
    """A gateway in front of a scripted model server."""

    upstream: Upstream
    gateway: Any
    url: str
    client: httpx.Client
    server: Any

    def ask(self, stream: bool = True, **fields: Any) -> httpx.Response:
        """A chat request with the right key."""
        body = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}], "stream": stream, **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def until(self, condition: Any, seconds: float = 5.0) -> None:
        """Wait for something that happens in another thread."""
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends, "it did not happen"
            time.sleep(0.005)


@contextmanager
def staged(guard: Any, upstream: Upstream | None = None, **settings: Any) -> Iterator[Stage]:
    """Run both in a thread; keyword arguments are those of `ServeConfig`, or `create_app`'s own."""
    upstream = upstream or Upstream()
    own = {name: settings.pop(name) for name in _OWN if name in settings}
    config = ServeConfig(**settings)
    ready = threading.Event()
    shared: dict[str, Any] = {}

    async def play() -> None:
        model = await asyncio.start_server(upstream.handle, "127.0.0.1", 0)
        upstream.url = f"http://127.0.0.1:{model.sockets[0].getsockname()[1]}"
        app = create_app(config, own.pop("upstream_url", upstream.url), guard, api_keys=[KEY], **own)
        sock = listen("127.0.0.1", 0, config.limits.stall_timeout_s)
        shared.update(app=app, server=server(app, ready.set, warm_up=False), port=sock.getsockname()[1])
        try:
            await shared["server"].serve(sockets=[sock])
        finally:
            sock.close()
            model.close()
            ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(play()), daemon=True)
    thread.start()
    assert ready.wait(10)
    url = f"http://127.0.0.1:{shared['port']}"
    with httpx.Client(base_url=url, headers=HEADERS, timeout=20, trust_env=False) as client:
        try:
            yield Stage(upstream, shared["app"].state.gateway, url, client, shared["server"])
        finally:
            client.close()
            shared["server"].should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the gateway did not end"


def events(content: str) -> list[Any]:
    """The data of server-sent events, parsed; [DONE] as it is."""
    data = [line.removeprefix("data: ") for line in content.split("\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def text_of(content: str) -> str:
    """All text of a streamed chat answer."""
    return "".join(
        choice["delta"].get("content") or ""
        for event in events(content)
        if event != "[DONE]" and "choices" in event
        for choice in event["choices"]
    )


def finish_of(content: str) -> str | None:
    """The reason of the end of a streamed chat answer, None where it has none."""
    reasons = [
        choice["finish_reason"]
        for event in events(content)
        if event != "[DONE]" and "choices" in event
        for choice in event["choices"]
        if choice["finish_reason"]
    ]
    return reasons[-1] if reasons else None
