"""What all requests of one gateway share, and how it comes to an end."""

import asyncio
import logging
from collections.abc import Sequence

from ballast.errors import ConfigError
from ballast.guardrails.types import Guardrail
from ballast.pipeline.config_serve import ServeConfig
from ballast.pipeline.serving.audit import AuditLog
from ballast.pipeline.serving.judging import Judge
from ballast.pipeline.serving.limits import Keys, RateLimit
from ballast.pipeline.serving.metrics import Metrics
from ballast.pipeline.serving.problems import Problem, shutting_down
from ballast.pipeline.serving.release import Releaser
from ballast.pipeline.serving.requests import Ask, Understanding
from ballast.pipeline.serving.upstream import Upstream

_log = logging.getLogger(__name__)

# What is given to answers that were told to end, so that their clients hear of it.
_FAREWELL_S = 2.0


class Gateway:
    """The parts of a gateway, and its answers under way; see `app.create_app` for the arguments."""

    def __init__(
        self,
        settings: ServeConfig,
        upstream_url: str,
        guard: Guardrail | None,
        *,
        system_prompt: str | None,
        default_system_prompt: str | None,
        special_tokens: Sequence[str],
        models: Sequence[str] | None,
        api_keys: Sequence[str] | None,
        upstream_key: str | None,
    ) -> None:
        if guard is None and not settings.unguarded:
            raise ConfigError(
                "the gateway has no guardrail, so nothing would judge its answers; set serve.guard, or serve.unguarded to true to "
                "release everything"
            )
        self.settings = settings
        self.keys = Keys(settings, api_keys)
        self.rate = RateLimit(settings.limits.requests_per_minute, settings.limits.burst)
        self.understanding = Understanding(settings, system_prompt, default_system_prompt, special_tokens, models)
        self.metrics = Metrics()
        self.upstream = Upstream(upstream_url, settings.upstream_timeout_s, upstream_key)
        self.judge = Judge(guard, settings.guarding, self.metrics) if guard is not None else None
        self.audit = AuditLog(settings.audit)
        self.releaser = Releaser(settings, self.upstream, self.judge, self.audit, self.metrics)
        self.draining = False
        self.stopped = asyncio.Event()
        self._in_flight = 0  # being written
        self._under_way = 0  # these, and those whose last words are on their way to the client
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """Count an answer in.

        Raises:
            Problem: 503 or 429; the gateway is coming to its end, or too many are under way.
        """
        if self.draining:
            raise shutting_down()
        if self._in_flight >= self.settings.limits.concurrent:
            raise Problem(
                429,
                "too_many_at_once",
                f"{self._in_flight} answers are being written, which is the limit; try again later",
                headers={"Retry-After": "1"},
            )
        self._in_flight += 1
        self._under_way += 1
        self.metrics.in_flight.inc()
        self._idle.clear()

    def leave(self) -> None:
        """Give the place of an answer back, which is written to its end."""
        self._in_flight -= 1
        self.metrics.in_flight.dec()

    def record(self, ask: Ask, request_id: str, client: str, end: str, chars: int, seconds: float) -> None:
        """Record how an answer ended, and count it out: nothing more is sent of it."""
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()
        route = "chat" if ask.chat else "completions"
        self.metrics.requests.labels(route, end).inc()
        self.audit.write(
            "ended",
            request=request_id,
            client=client,
            route=route,
            model=ask.model,
            stream=ask.stream,
            end=end,
            released_chars=chars,
            seconds=round(seconds, 4),
        )
        self.metrics.audit_lost.set(self.audit.lost)

    async def drain(self, seconds: float) -> None:
        """Take no new requests; wait for the answers under way; tell those that take longer that it is over."""
        self.draining = True
        if await self._wait_idle(seconds):
            return
        _log.warning("%d answers are not finished after %g s; they are ended", self._under_way, seconds)
        self.stopped.set()
        await self._wait_idle(_FAREWELL_S)

    async def _wait_idle(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def aclose(self) -> None:
        """Give back threads, connections and the audit file."""
        self.draining = True
        self.stopped.set()
        if self.judge is not None:
            self.judge.close()
        await self.upstream.aclose()
        self.audit.close()
