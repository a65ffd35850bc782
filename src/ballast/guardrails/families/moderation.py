"""An OpenAI-compatible `/v1/moderations` endpoint as a guard: it scores each prefix of the response by category.

Such an endpoint reads one text, so the guard judges the response and never sees the prompt; it is off its usual
ground on a response cut in mid-sentence. Its scores are the provider's and not probabilities that were checked:
calibrate them. Every prefix that is judged leaves this machine for one address of `base_url`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ballast.guardrails.engines.call import Unanswered
from ballast.guardrails.engines.endpoint import EndpointOptions
from ballast.guardrails.engines.http import JsonClient
from ballast.guardrails.engines.request import BadAnswerError
from ballast.guardrails.engines.server_state import ServerHealth
from ballast.guardrails.types import Exchange, RiskTrace


class ModerationOptions(EndpointOptions):
    """Options of a moderation endpoint; `base_url` is where the responses are sent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["moderation"] = "moderation"
    model: str | None = Field(default=None, description="the model's name on the server; None leaves it to the server")
    categories: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="categories of harm that count, as the server spells them; None counts all that it scores",
    )


class _Result(BaseModel):
    category_scores: dict[str, Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False, strict=True)]]


class _Moderation(BaseModel):
    results: Annotated[list[_Result], Field(min_length=1, max_length=1)]


class ModerationGuard:
    """A moderation endpoint, asked once a distinct prefix: risk = the highest score of the categories that count.

    `assess` may be called from any thread. A server that is down, slow or talks nonsense leaves its cuts unscored,
    within a bounded time.

    Raises:
        ConfigError: an address is no http address, is there twice or holds a password, or the variable named by
            `api_key_env` is not set.
    """

    def __init__(self, options: ModerationOptions) -> None:
        self.options = options
        self.name = f"moderation:{options.model}" if options.model else "moderation"
        self._client = JsonClient(options, guard=self.name)

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """Judge each response at each of its cuts, with the category of the highest score; see `Guardrail.assess`.

        Text that is not valid Unicode is unscored, and so is what the server does not score: an empty prefix, with
        some servers, and text that is too long for it.
        """
        pairs = list(zip(exchanges, cuts, strict=True))
        judged = self._judge({exchange.response[:cut] for exchange, asked in pairs for cut in asked})
        return [_trace(asked, [judged[exchange.response[:cut]] for cut in asked]) for exchange, asked in pairs]

    def servers(self) -> tuple[ServerHealth, ...]:
        """(S,) what is known of each server."""
        return self._client.health()

    def _judge(self, prefixes: set[str]) -> "dict[str, tuple[float, str] | Unanswered]":
        judged: dict[str, tuple[float, str] | Unanswered] = {}
        texts = []
        for text in sorted(prefixes, key=len):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                judged[text] = Unanswered("the text is not valid Unicode (a lone surrogate)")
            else:
                texts.append(text)
        answers = self._client.post_all("/moderations", [self._body(text) for text in texts], self._read)
        judged.update(zip(texts, answers, strict=True))
        return judged

    def _body(self, text: str) -> Mapping[str, Any]:
        named = {} if self.options.model is None else {"model": self.options.model}
        return {**named, "input": text}

    def _read(self, content: bytes, number: int) -> tuple[float, str]:
        """The highest score and its category."""
        scores = _Moderation.model_validate_json(content).results[0].category_scores
        wanted = scores if self.options.categories is None else self.options.categories
        if missing := [category for category in wanted if category not in scores]:
            raise BadAnswerError(f"it has no score for {', '.join(missing)}; set categories to what the server scores")
        if not scores:
            raise BadAnswerError("it scores no category at all")
        worst = max(wanted, key=lambda category: scores[category])
        return scores[worst], worst


def _trace(cuts: Sequence[int], judged: "Sequence[tuple[float, str] | Unanswered]") -> RiskTrace:
    reasons = dict.fromkeys(answer.reason for answer in judged if isinstance(answer, Unanswered))
    return RiskTrace(
        cuts=tuple(cuts),
        risk=tuple(None if isinstance(answer, Unanswered) else answer[0] for answer in judged),
        reason="; ".join(reasons) or None,
        category=tuple(None if isinstance(answer, Unanswered) else answer[1] for answer in judged),
    )
