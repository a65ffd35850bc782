"""A real HTTP server on this machine that misbehaves on purpose, for tests of what asks servers."""

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        body: sent as JSON, or as it is where it is bytes.
        status: HTTP status.
        headers: beside content type and length.
        delay_s: seconds before the first byte; the server's end cuts it short.
        sent: bytes of the body that are sent before the connection is closed; None sends all.
        drip_s: seconds between two bytes of the body; 0 sends it at once.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    sent: int | None = None
    drip_s: float = 0.0


HANG_UP = Reply(status=0)  # closes the connection without a word

Script = Callable[[dict[str, Any], int], Reply]


class _Http(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for the last answer

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up whenever it likes
            super().handle_error(request, client_address)


class FaultServer:
    """Answers each POST by `script(request, attempt)`, the attempt counted from 0 for equal requests.

    Args:
        script: what it answers.
        port: where it listens; 0 takes a free one.
    """

    def __init__(self, script: Script, port: int = 0) -> None:
        self.script = script
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.most_at_once = 0
        self.over = threading.Event()
        self._now = 0
        self._killed = False
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 5

            def setup(self) -> None:
                super().setup()
                owner._connections.append(self.connection)

            def do_POST(self) -> None:
                owner._answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = _Http(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=lambda: self._http.serve_forever(poll_interval=0.01), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Address up to and including the version."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._http.server_address[1])

    def close(self) -> None:
        """Stop answering, and refuse connections from now on."""
        self.over.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def kill(self) -> None:
        """Break off every connection in the middle of whatever it does, and refuse further ones."""
        self._killed = True
        for connection in list(self._connections):
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        self.close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        request = json.loads(raw)
        with self._lock:
            attempt = sum(request == earlier for _, _, earlier in self.requests)
            self.requests.append((handler.path, dict(handler.headers), request))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            # A client that has given up is what some of these answers are for.
            with suppress(ConnectionError):
                self._send(handler, self.script(request, attempt))
        finally:
            with self._lock:
                self._now -= 1

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        self.over.wait(reply.delay_s)
        if reply is HANG_UP or self._killed:
            handler.close_connection = True
            return
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        handler.send_response(reply.status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **reply.headers,
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        if reply.drip_s:
            for byte in body:
                handler.wfile.write(bytes([byte]))
                self.over.wait(reply.drip_s)
            return
        handler.wfile.write(body[: reply.sent])
        if reply.sent is not None:
            handler.close_connection = True


@contextmanager
def serving(script: Script, port: int = 0) -> Iterator[FaultServer]:
    """A server that answers by `script` until the end of the block."""
    server = FaultServer(script, port)
    try:
        yield server
    finally:
        server.close()
