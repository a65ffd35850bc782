"""The section `serve`: the gateway in front of the model server, and the guardrail that works while it writes."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ballast.guardrails.registry import NestedGuardOptions
from ballast.guardrails.segments import SegmentOptions
from ballast.pipeline.config_base import Component


class ServeLimits(Component):
    """What one request, one client and all clients together may ask for. Beyond a limit a request is refused."""

    body_bytes: PositiveInt = Field(1_048_576, description="largest request body; 413 beyond it")
    messages: PositiveInt = Field(256, description="most messages of one conversation")
    prompt_chars: PositiveInt = Field(65_536, description="most characters of all messages of a request together")
    max_tokens: PositiveInt = Field(
        4096, description="largest max_tokens that may be asked for; a request without one gets what the context leaves"
    )
    answer_chars: PositiveInt = Field(
        65_536, description="characters after which an answer ends with finish_reason 'length'"
    )
    concurrent: PositiveInt = Field(64, description="answers being written at once, over all clients; 429 beyond it")
    requests_per_minute: NonNegativeInt = Field(
        600, description="requests a minute of one key, or of one address where no key is required; 0 sets no limit"
    )
    burst: PositiveInt = Field(60, description="requests that may come at once before requests_per_minute counts")
    body_timeout_s: PositiveFloat = Field(10.0, description="seconds in which a client must send its request body")
    stall_timeout_s: PositiveFloat = Field(
        30.0, description="seconds for which a client may leave its answer unread before the request is given up"
    )
    request_timeout_s: PositiveFloat = Field(600.0, description="seconds that one answer may take in all")


class ServeGuard(Component):
    """How the guardrail decides on what is released."""

    threshold: float = Field(0.5, gt=0, le=1, description="risk from which on a segment is not released")
    segments: SegmentOptions = Field(
        SegmentOptions(unit="words", size=5), description="what is judged and released together; words or sentences"
    )
    timeout_s: PositiveFloat = Field(
        5.0, description="seconds that a judgement may take, waiting for a free worker included"
    )
    workers: PositiveInt = Field(4, description="judgements under way at once; more wait")
    on_failure: Literal["block", "release"] = Field(
        "block",
        description="what happens where the guard is down, slow or leaves a segment unscored: end the answer, or release the segment "
        "unguarded, which is logged each time",
    )
    safe_message: str = Field(
        "I can't continue with this answer.",
        min_length=1,
        description="what the client gets in place of the blocked rest",
    )

    @model_validator(mode="after")
    def _text_can_be_cut(self) -> Self:
        if self.segments.unit == "tokens":
            raise ValueError(
                "serve.guarding.segments.unit = tokens: the model server streams text, whose tokens are not known here; use words or "
                "sentences"
            )
        return self


class ServeAudit(Component):
    """The record of decisions, one JSON object a line."""

    path: str | None = Field(None, min_length=1, description="file that lines are appended to; null keeps no record")
    text: bool = Field(False, description="write the judged text beside each decision; keep such a file as a secret")


class ServeConfig(Component):
    """The gateway of `ballast serve`."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    require_key: bool = Field(True, description="whether each request needs a key; /health never does")
    api_key_env: str = Field(
        "BALLAST_API_KEYS", min_length=1, description="environment variable with the accepted keys, separated by commas"
    )
    guard: NestedGuardOptions | None = Field(
        None, description="the guardrail that judges answers; null takes the run's guard"
    )
    unguarded: bool = Field(
        False, description="serve without any guardrail, not the run's either; every answer is released unjudged"
    )
    guarding: ServeGuard = ServeGuard()
    system_prompt_policy: Literal["enforce", "merge", "client"] = Field(
        "enforce",
        description="a client's own system message is refused (enforce); stands after the contract's (merge); or replaces it (client)",
    )
    completions: Literal["chat", "raw", "off"] = Field(
        "chat",
        description="what /v1/completions does with its prompt: one user message in the contract's chat format; the bare text, without "
        "format and system prompt; or refuse",
    )
    limits: ServeLimits = ServeLimits()
    audit: ServeAudit = ServeAudit()
    upstream_timeout_s: PositiveFloat = Field(
        120.0, description="seconds that the model server may be silent before a request is given up"
    )
    shutdown_s: PositiveFloat = Field(
        20.0, description="seconds that answers being written get to end when the gateway is told to stop"
    )

    @model_validator(mode="after")
    def _guarded_or_not(self) -> Self:
        if self.unguarded and self.guard is not None:
            raise ValueError(
                f"serve.guard = {self.guard.type} and serve.unguarded = true: the guard would judge nothing; leave one of the two out"
            )
        return self
