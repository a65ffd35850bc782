"""What a client may ask for, and what the model server is asked in its place.

Only listed fields exist: a model server takes many more, and some of them change the chat format (`chat_template`,
`add_generation_prompt`), return what no guardrail saw (`logprobs`, `echo`, `n`), or make the model write
something else than an answer (`tools`). The request that goes on is written anew from what was understood.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ballast.guardrails.types import Message
from ballast.pipeline.config_serve import ServeConfig
from ballast.pipeline.serving.problems import Problem


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a chat request."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str | list[_Part]

    @property
    def text(self) -> str:
        """The content as one string; parts stand on lines of their own."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """How the answer is streamed."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class _TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class _Common(BaseModel):
    """Fields of both routes. Those that are only known in order to be refused are checked in `_refuse`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=512)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    user: str | None = None
    n: int | None = None


class ChatRequest(_Common):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    response_format: _TextFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None


class CompletionRequest(_Common):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None


@dataclass(frozen=True)
class Ask:
    """A request that was understood.

    Attributes:
        chat: whether the client asked on the chat route, which decides the shape of the answer.
        model: the model asked for.
        messages: the conversation that the guardrail judges the answer to: as in training without the system prompt
            of the contract, but with the client's own system message.
        path: where the model server is asked, beginning with /v1.
        body: what it is asked.
        stream: whether the client takes the answer in pieces.
        include_usage: whether a streamed answer ends with its token counts.
    """

    chat: bool
    model: str
    messages: tuple[Message, ...]
    path: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]
    stream: bool
    include_usage: bool


# Sampling fields that go on to the model server as they are, where they were given.
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
)

Body = TypeVar("Body", bound=BaseModel)


class Understanding:
    """Turns bodies into what the model server is asked.

    Args:
        settings: limits and the policies of system prompt and completions.
        system_prompt: the contract's; None where it has none.
        default_system_prompt: what the chat template writes in its place then.
        special_tokens: texts that the model server's tokenizer reads as special tokens wherever they stand.
        models: names that may be asked for; None leaves it to the model server.
    """

    def __init__(
        self,
        settings: ServeConfig,
        system_prompt: str | None,
        default_system_prompt: str | None,
        special_tokens: Sequence[str],
        models: Sequence[str] | None,
    ) -> None:
        self._settings, self._system_prompt, self.models = settings, system_prompt, models
        self._default_system_prompt = default_system_prompt
        self._special = tuple(token for token in special_tokens if token)

    def chat(self, body: bytes) -> Ask:
        """Read a chat request.

        Raises:
            Problem: 400 or 404; what cannot be served, and why.
        """
        request = _parse(ChatRequest, body)
        self._check(request)
        for name in ("tools", "functions"):
            _refuse(
                name, getattr(request, name), (None, []), "tool calls are not served, since no guardrail reads them"
            )
        for name in ("tool_choice", "function_call"):
            _refuse(
                name, getattr(request, name), (None, "none"), "tool calls are not served, since no guardrail reads them"
            )
        _refuse("logprobs", request.logprobs, (None, False), "log-probabilities tell text that was not released")
        _refuse("top_logprobs", request.top_logprobs, (None, 0), "log-probabilities tell text that was not released")
        limits = self._settings.limits
        if len(request.messages) > limits.messages:
            raise _bad("messages", "too_many_messages", f"{len(request.messages)} messages; {limits.messages} at most")
        messages = [Message(role=message.role, content=message.text) for message in request.messages]
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise _bad("max_tokens", "invalid_value", "give max_tokens or max_completion_tokens, and not both")
        tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        return self._ask(request, True, messages, tokens)

    def completion(self, body: bytes) -> Ask:
        """Read a completion request.

        Raises:
            Problem: 400 or 404; what cannot be served, and why.
        """
        if self._settings.completions == "off":
            raise Problem(404, "not_served", "this server serves /v1/chat/completions only")
        request = _parse(CompletionRequest, body)
        self._check(request)
        _refuse("logprobs", request.logprobs, (None, 0), "log-probabilities tell text that was not released")
        _refuse("best_of", request.best_of, (None, 1), "one answer a request is served")
        _refuse("echo", request.echo, (None, False), "the prompt is not repeated")
        _refuse("suffix", request.suffix, (None, ""), "text is not inserted")
        prompt = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
        return self._ask(request, False, [Message(role="user", content=prompt)], request.max_tokens)

    def _check(self, request: _Common) -> None:
        _refuse("n", request.n, (None, 1), "one answer a request is served")
        if self.models is not None and request.model not in self.models:
            raise Problem(404, "model_not_found", f"no such model; served: {', '.join(self.models)}", "model")

    def _ask(self, request: _Common, chat: bool, messages: list[Message], max_tokens: int | None) -> Ask:
        limits, place = self._settings.limits, "messages" if chat else "prompt"
        length = sum(len(message["content"]) for message in messages)
        if length > limits.prompt_chars:
            raise _bad(place, "prompt_too_long", f"{length} characters; {limits.prompt_chars} at most")
        if max_tokens is not None and max_tokens > limits.max_tokens:
            raise _bad("max_tokens", "invalid_value", f"max_tokens is {max_tokens}; {limits.max_tokens} at most")
        for message in messages:
            self._check_text(message["content"], place)
        for stop in [request.stop] if isinstance(request.stop, str) else request.stop or []:
            self._check_text(stop, "stop")
        raw = not chat and self._settings.completions == "raw"
        body: dict[str, Any] = {"model": request.model, "stream": True, "stream_options": {"include_usage": True}}
        if raw:
            body["prompt"] = messages[0]["content"]
        else:
            body["messages"] = self._with_system(messages)
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        body |= {name: value for name in _SAMPLING if (value := getattr(request, name)) is not None}
        stream = bool(request.stream)
        return Ask(
            chat=chat,
            model=request.model,
            messages=tuple(messages),
            path="/v1/completions" if raw else "/v1/chat/completions",
            body=body,
            stream=stream,
            include_usage=stream and request.stream_options is not None and request.stream_options.include_usage,
        )

    def _check_text(self, text: str, place: str) -> None:
        for token in self._special:
            if token in text:
                raise _bad(
                    place,
                    "special_token",
                    f"the text holds {token!r}, which the model reads as a special token and not as text; leave it out",
                )

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if any(message["role"] == "system" for message in messages[1:]):
            raise _bad("messages", "system_message", "a system message may stand at the beginning only")
        own = messages[0]["content"] if messages[0]["role"] == "system" else None
        rest = messages if own is None else messages[1:]
        if not rest:
            raise _bad("messages", "no_request", "there is a system message only; add a user message")
        policy = self._settings.system_prompt_policy
        if own is not None and policy == "enforce":
            raise _bad(
                "messages",
                "system_message",
                "this server sets the system message itself; send the conversation without one",
            )
        # A template's default is left to the template, whose text may change with the day or be trimmed otherwise.
        system = own if own is not None else self._system_prompt
        if policy == "merge" and own is not None:
            first = self._default_system_prompt if self._system_prompt is None else self._system_prompt
            system = "\n\n".join(text for text in (first, own) if text) or None
        return rest if system is None else [Message(role="system", content=system), *rest]


def _parse(kind: type[Body], body: bytes) -> Body:
    try:
        return kind.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise _first(error) from None  # its text quotes the body


def _first(error: ValidationError) -> Problem:
    """The first thing that is wrong, by its place and kind."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return Problem(400, "invalid_json", "the body is no valid JSON")
    place = ".".join(str(part)[:64] for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _bad(place, "unknown_parameter", "this field is not served; leave it out")
    return _bad(place or None, "invalid_value", first["msg"])


def _refuse(name: str, value: Any, harmless: tuple[Any, ...], why: str) -> None:
    if value not in harmless:
        raise _bad(name, "unsupported_parameter", f"{why}; leave it out")


def _bad(param: str | None, code: str, message: str) -> Problem:
    return Problem(400, code, f"{param}: {message}" if param else message, param)
