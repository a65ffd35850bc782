"""What the options of a remote guard or engine say about its servers, and what an address must be."""

import os
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

from ballast.errors import ConfigError


class EndpointOptions(BaseModel):
    """One server, or several with the same model behind them, and how patient to be with them."""

    base_url: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="address up to the version, e.g. `http://localhost:8000/v1`; a list for several servers of one model"
    )
    api_key_env: str | None = Field(
        default=None, description="environment variable that holds the servers' key; None sends no key"
    )
    connections: PositiveInt = Field(default=8, description="requests under way at one server at the same time")
    timeout_s: PositiveFloat = Field(default=30.0, description="seconds that one request may take")
    retries: int = Field(
        default=3, ge=0, description="further attempts after a failed one, at any server; 0 makes one attempt only"
    )
    backoff_s: float = Field(
        default=0.5, ge=0, description="seconds before a server is asked again; each later wait is twice as long"
    )
    hedge_quantile: float = Field(
        default=0.95,
        ge=0,
        lt=1,
        description="quantile of recent answers' times after which a request is sent to a second server as well; 0 never",
    )

    @property
    def addresses(self) -> tuple[str, ...]:
        """(S,) the servers, without a slash at the end."""
        given = (self.base_url,) if isinstance(self.base_url, str) else self.base_url
        return tuple(address.rstrip("/") for address in given)


def check_addresses(addresses: tuple[str, ...], guard: str) -> None:
    """Refuse what is no address, what stands there twice, and a password: addresses are logged and kept with the run.

    Raises:
        ConfigError: with the guard's name and what to write instead.
    """
    for address in addresses:
        if "@" in address:
            raise ConfigError(
                f"guardrail '{guard}': base_url holds a user name or password (an @); put the key into an environment "
                "variable and name that in api_key_env"
            )
        if not _is_http(address):
            raise ConfigError(
                f"guardrail '{guard}': base_url is '{address}', which is no http address; write it like http://localhost:8000/v1"
            )
        if addresses.count(address) > 1:
            raise ConfigError(
                f"guardrail '{guard}': base_url names '{address}' {addresses.count(address)} times; name each server "
                "once, and raise connections to send it more at a time"
            )


def _is_http(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def authorization(api_key_env: str | None, guard: str) -> dict[str, str]:
    """The header with the key that the environment holds; none where no variable is named.

    Raises:
        ConfigError: the variable is not set, or holds what cannot be a key.
    """
    if api_key_env is None:
        return {}
    key = os.environ.get(api_key_env, "").strip()
    if not key.isascii() or not key.isprintable() or not key:
        raise ConfigError(
            f"guardrail '{guard}': api_key_env names the environment variable {api_key_env}, which is "
            "not set or holds what cannot be a key; export it, or set api_key_env to null for a server that asks for none"
        )
    return {"Authorization": f"Bearer {key}"}
