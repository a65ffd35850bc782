"""How often a client may ask, and who is a client."""

import hashlib
import hmac
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from ballast.errors import ConfigError
from ballast.pipeline.config_serve import ServeConfig
from ballast.pipeline.serving.problems import Problem

# Buckets that are kept: without keys a client is an address, and addresses are many.
_MOST_CLIENTS = 10_000


class RateLimit:
    """A bucket of requests a client, filled evenly.

    Args:
        per_minute: requests a minute in the long run; 0 sets no limit.
        burst: requests that a full bucket holds.
        clock: seconds, monotonic.
    """

    def __init__(self, per_minute: int, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_minute / 60, float(burst), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (content, when)

    def take(self, client: str) -> None:
        """Count one request.

        Raises:
            Problem: 429; the client has no request left, with the seconds after which it has one.
        """
        if not self._per_second:
            return
        now = self._clock()
        content, then = self._buckets.pop(client, (self._burst, now))
        content = min(self._burst, content + (now - then) * self._per_second)
        self._buckets[client] = (content - 1 if content >= 1 else content, now)
        if len(self._buckets) > _MOST_CLIENTS:
            self._buckets.popitem(last=False)  # the one that asked longest ago, whose bucket is the fullest
        if content < 1:
            wait = math.ceil((1 - content) / self._per_second)
            raise Problem(
                429,
                "rate_limit_exceeded",
                f"too many requests; the next one is accepted in {wait} s",
                headers={"Retry-After": str(wait)},
            )


class Keys:
    """The accepted API keys, kept as digests.

    Args:
        settings: whether keys are required, and where they stand if `given` is None.
        given: the keys themselves.

    Raises:
        ConfigError: keys are required and there is none, or one that no header can carry.
    """

    def __init__(self, settings: ServeConfig, given: Sequence[str] | None) -> None:
        if given is None:
            given = [key.strip() for key in os.environ.get(settings.api_key_env, "").split(",")]
        keys = [key for key in given if key]
        if settings.require_key and not keys:
            raise ConfigError(
                f"the gateway requires an API key and the environment variable {settings.api_key_env} holds none; set it to one or more "
                "keys separated by commas, or set serve.require_key to false to let everyone in"
            )
        if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
            raise ConfigError(
                f"a key in {settings.api_key_env} holds a character that no Authorization header can carry; use ASCII letters, digits and -_"
            )
        self._required = settings.require_key
        self._digests = [_digest(key) for key in keys]

    def client(self, authorization: str | None, address: str) -> str:
        """Who asks: a short name of the key, which does not tell the key, or the address where none is required.

        Raises:
            Problem: 401; a key is required, and there is none or a wrong one.
        """
        if not self._required:
            return address
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorised("no API key: send the header 'Authorization: Bearer KEY'")
        digest = _digest(key.strip())
        # All are compared, in constant time each, so that the time taken says nothing about them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise _unauthorised("wrong API key")
        return f"key-{digest.hex()[:8]}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthorised(message: str) -> Problem:
    return Problem(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
