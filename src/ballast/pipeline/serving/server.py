"""Running the gateway: its socket, its guard's loading, its signals and its end.

SIGTERM and SIGINT begin the end: new requests are refused with 503, answers under way get `serve.shutdown_s` to
finish, those that take longer are told so in their stream, and then connections, threads and files are given back.
"""

import asyncio
import errno
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from ballast.errors import BallastError, ConfigError
from ballast.pipeline.serving.gateway import Gateway

_BACKLOG = 1024
_LOOK_S = 0.1  # between two looks for a signal


def listen(host: str, port: int, unread_s: float) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Args:
        host: address or name.
        port: TCP port.
        unread_s: seconds after which the system drops a connection whose other side takes no data, so that a client
            that never reads leaves no socket behind (Linux; elsewhere the system's own time holds).

    Raises:
        ConfigError: the port is in use or not allowed, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"serve.host = '{host}' is no address ({error}); write one of this machine") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unread_s * 1000))
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(_why_not(host, port, error)) from error
    sock.setblocking(False)
    return sock


def _why_not(host: str, port: int, error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"port {port} on {host} is in use; stop what listens there, or set serve.port to another one (0 takes a free one)"
        case errno.EACCES:
            return f"port {port} may not be opened by this user; set serve.port to 1024 or above"
        case _:
            return f"cannot listen on {host}:{port} ({error.strerror}); set serve.host to an address of this machine"


class _Server(uvicorn.Server):
    """uvicorn, which lets the gateway say goodbye before it closes connections."""

    def __init__(
        self, config: uvicorn.Config, gateway: Gateway, ready: Callable[[], None] | None, warm_up: bool
    ) -> None:
        super().__init__(config)
        self._gateway, self._ready, self._warm_up = gateway, ready, warm_up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._warm_up and not await self._guard_is_ready():
            await self._gateway.aclose()
            return
        await super().startup(sockets=sockets)
        if self.started and self._ready is not None:
            self._ready()

    async def _guard_is_ready(self) -> bool:
        """Load the guard before clients wait for it; false where a signal comes first."""
        judge = self._gateway.judge
        if judge is None:
            return True
        task = asyncio.ensure_future(judge.warm_up())
        while not task.done() and not self.should_exit:
            await asyncio.wait({task}, timeout=_LOOK_S)
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return False
        try:
            task.result()
        except BallastError:
            await self._gateway.aclose()
            raise
        return True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.ensure_future(self._gateway.drain(self._gateway.settings.shutdown_s))
        # A second SIGINT sets force_exit, and there is no waiting then.
        while not draining.done() and not self.force_exit:
            await asyncio.wait({draining}, timeout=_LOOK_S)
        self._gateway.stopped.set()
        draining.cancel()
        await super().shutdown(sockets=sockets)


def serve(app: FastAPI, sock: socket.socket, ready: Callable[[], None] | None = None, warm_up: bool = True) -> None:
    """Serve until SIGTERM or SIGINT, in the main thread, and close the socket.

    Args:
        app: from `create_app`.
        sock: from `listen`.
        ready: called once requests are accepted.
        warm_up: load the guard first and let it judge a short text.

    Raises:
        GuardError: the guard did not judge it.
    """
    try:
        server(app, ready, warm_up).run(sockets=[sock])
    finally:
        sock.close()


def server(app: FastAPI, ready: Callable[[], None] | None = None, warm_up: bool = True) -> uvicorn.Server:
    """The server of an application, for who runs it in a thread or loop of their own: set `should_exit` to end it.

    Arguments and errors of its `run` are those of `serve`.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        # Answers were told to end by then; what is left after it hangs.
        timeout_graceful_shutdown=5,
        # Who may speak for another address is for a proxy's own configuration to say.
        proxy_headers=False,
    )
    return _Server(config, app.state.gateway, ready, warm_up)
