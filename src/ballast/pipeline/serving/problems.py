"""What a request is refused with, in the shape of OpenAI's errors. No message quotes what a client or a model wrote."""

from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse


@dataclass(eq=False)  # exceptions are told apart by identity
class Problem(Exception):  # noqa: N818 (the word of RFC 9457)
    """One refusal or failure that a client is told about.

    Attributes:
        status: HTTP status; counts only while no byte of the answer was sent.
        code: a word for programs.
        message: a sentence for people.
        param: the field of the request that it is about.
        headers: beside content type and length.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The error object as OpenAI's clients read it."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole HTTP answer."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


class ClientGone(Exception):  # noqa: N818 (it is no error of anybody)
    """The client went away or no longer reads; nobody is left to be told."""


def guard_unavailable() -> Problem:
    """The guardrail could not judge, and the gateway is set to fail closed."""
    return Problem(
        503,
        "guard_unavailable",
        "the guardrail could not judge the answer, so it is not released; try again later",
        headers={"Retry-After": "5"},
    )


def shutting_down() -> Problem:
    """The gateway was told to stop."""
    return Problem(
        503, "shutting_down", "the server is shutting down; send the request again", headers={"Retry-After": "5"}
    )
