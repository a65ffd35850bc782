"""Handing an answer to a client: in pieces or whole, and giving up at once when nobody takes it any more."""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ballast.pipeline.serving.answers import Shape, failure
from ballast.pipeline.serving.gateway import Gateway
from ballast.pipeline.serving.problems import ClientGone, Problem, shutting_down
from ballast.pipeline.serving.release import Ended
from ballast.pipeline.serving.requests import Ask

_BETWEEN = "\n\n"  # stands between what was released and the safe message


class Delivery(Response):
    """The answer to one request that was understood.

    A streamed answer starts with its first released segment, so that what fails before it is a proper HTTP error.
    Whatever ends an answer, its request at the model server is closed first.

    Args:
        gateway: who answers.
        ask: what was asked.
        request_id: the answer's id, also in the audit log.
        client: who asked, for the audit log.
    """

    def __init__(self, gateway: Gateway, ask: Ask, request_id: str, client: str) -> None:
        super().__init__()
        self._gateway, self._ask, self._id, self._client = gateway, ask, request_id, client
        self._shape = Shape(ask, request_id)
        self._begin = time.perf_counter()
        self._started = self._counted = False
        self._chars = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, as an ASGI application."""
        try:
            self._gateway.begin()
        except Problem as problem:
            await problem.response()(scope, receive, send)
            return
        self._counted = True
        end = "error"
        try:
            end = await self._while_wanted(receive, self._deliver(scope, receive, send))
        except Problem as problem:
            end = problem.code
            self._leave()
            await self._tell(scope, receive, send, problem)
        except ClientGone:
            end = "client_gone"
        except asyncio.CancelledError:
            end = "cancelled"
            raise
        finally:
            seconds = time.perf_counter() - self._begin
            self._leave()
            self._gateway.record(self._ask, self._id, self._client, end, self._chars, seconds)

    async def _deliver(self, scope: Scope, receive: Receive, send: Send) -> str:
        """Send the whole answer; the reason of its end."""
        kept: list[str] = []  # of an answer that is sent whole
        async with aclosing(self._gateway.releaser.release(self._ask, self._id)) as released:
            async for what in released:
                if isinstance(what, Ended):
                    self._leave()
                    await (
                        self._last(send, what) if self._ask.stream else self._whole(scope, receive, send, kept, what)
                    )
                    return what.finish
                if not self._chars:
                    self._gateway.metrics.first_release.observe(time.perf_counter() - self._begin)
                if self._ask.stream:
                    await self._chunk(send, self._shape.text(what.text))
                else:
                    kept.append(what.text)
                self._chars += len(what.text)
        raise AssertionError("an answer without an end")  # release() ends with Ended, or raises

    def _leave(self) -> None:
        """Give the place back, before the client hears of the end and may ask again."""
        if self._counted:
            self._counted = False
            self._gateway.leave()

    async def _whole(self, scope: Scope, receive: Receive, send: Send, kept: list[str], end: Ended) -> None:
        # Of a blocked answer nothing has left yet, so nothing of it has to.
        blocked = end.finish == "content_filter"
        text = self._gateway.settings.guarding.safe_message if blocked else "".join(kept)
        response = JSONResponse(self._shape.whole(text, end), headers={"x-request-id": self._id})

        async def patiently(message: Message) -> None:
            await self._send(send, message)

        self._started = True
        await response(scope, receive, patiently)

    async def _last(self, send: Send, end: Ended) -> None:
        if end.finish == "content_filter":
            message = self._gateway.settings.guarding.safe_message
            await self._chunk(send, self._shape.text(f"{_BETWEEN}{message}" if self._chars else message))
        await self._chunk(send, self._shape.last(end), more=False)

    async def _chunk(self, send: Send, data: bytes, more: bool = True) -> None:
        if not self._started:
            self._started = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-store"),
                (b"x-accel-buffering", b"no"),
                (b"x-request-id", self._id.encode()),
            ]
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
            data = self._shape.first() + data
        await self._send(send, {"type": "http.response.body", "body": data, "more_body": more})

    async def _send(self, send: Send, message: Message) -> None:
        """Send, and give up on a client that does not read.

        Raises:
            ClientGone: it went away, or left its answer unread for too long.
        """
        try:
            async with asyncio.timeout(self._gateway.settings.limits.stall_timeout_s):
                await send(message)
        except (TimeoutError, OSError) as error:
            raise ClientGone from error

    async def _tell(self, scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
        """Tell the client of a failure: as an HTTP error while that is possible, in the stream later."""
        with suppress(ClientGone):
            if not self._started:
                await problem.response()(scope, receive, send)
            elif self._ask.stream:
                await self._chunk(send, failure(problem), more=False)

    async def _while_wanted(self, receive: Receive, work: Coroutine[Any, Any, str]) -> str:
        """Run `work` while the client is there, the gateway is not stopped and time is left; else cancel it.

        Raises:
            ClientGone: the client went away.
            Problem: the gateway is stopped, or the time is up.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(receive))
        stopped = asyncio.ensure_future(self._gateway.stopped.wait())
        limit = self._gateway.settings.limits.request_timeout_s
        try:
            await asyncio.wait({task, gone, stopped}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            if stopped.done():
                raise shutting_down()
            raise Problem(504, "request_timeout", f"the answer took longer than {limit:g} s")
        finally:
            for one in (task, gone, stopped):
                one.cancel()
            # Waited for, so that the model server's connection is closed before the client hears anything.
            await asyncio.gather(task, gone, stopped, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
