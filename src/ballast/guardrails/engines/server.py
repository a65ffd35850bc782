"""The engine of a guard that runs elsewhere: OpenAI-compatible `/v1/completions` endpoints that take token ids.

One request a distinct prompt, for one token at temperature 0 with log-probs. Read against vLLM 0.31, which takes
the ids to report (`logprob_token_ids`) and names tokens by id (`return_tokens_as_token_ids`). A server that
ignores the first reports its 20 most likely tokens, and `verdict_from_logprobs` says what a label missing there
counts as; one that ignores the second names tokens by text, which is ambiguous, and its answers stay unscored.
"""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, Strict

from ballast.guardrails.engines.call import Trial, Unanswered
from ballast.guardrails.engines.http import JsonClient
from ballast.guardrails.engines.interface import Group, Labels, Verdict
from ballast.guardrails.engines.logprobs import verdict_from_logprobs
from ballast.guardrails.engines.replicas import Replicas, Row, check_alike
from ballast.guardrails.engines.request import BadAnswerError
from ballast.guardrails.engines.server_state import ServerHealth

if TYPE_CHECKING:
    from ballast.guardrails.engines.options import ServerOptions

_TOP = 20  # the most that vLLM reports by default, for servers that do not take label ids
_TOKEN_ID = re.compile(r"token_id:(0|[1-9][0-9]*)")

_LogProb = Annotated[FiniteFloat, Strict()]


class _LogProbs(BaseModel):
    top_logprobs: Annotated[list[dict[str, _LogProb]], Field(min_length=1, max_length=1)]


class _Choice(BaseModel):
    logprobs: _LogProbs


class _Usage(BaseModel):
    prompt_tokens: int | None = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]
    usage: _Usage | None = None


class ServerEngine:
    """Asks completions endpoints for the verdict after each prompt.

    `score` may be called from any thread. Servers that are down, slow or talk nonsense leave prompts unscored only
    where no server scores them, within a bounded time (see `call`). That all servers answer alike is checked on the
    first prompts (see `replicas`).

    Args:
        options: the servers, and how patient to be with them.
        labels: token ids that begin a verdict.
        guard: the guard's name, for messages.
        model: the model's name on the servers where `options.model` is None.

    Raises:
        ConfigError: an address is no http address or is there twice, or the variable named by `api_key_env` is not
            set.
    """

    name = "server"

    def __init__(self, options: "ServerOptions", labels: Labels, *, guard: str, model: str) -> None:
        self._labels, self._guard = labels, guard
        self._client = JsonClient(options, guard=guard)
        self._replicas = Replicas(guard, len(options.addresses))
        self._request = {
            "model": options.model or model,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": _TOP,
            "logprob_token_ids": [*labels.safe, *labels.unsafe],
            "return_tokens_as_token_ids": True,
        }

    def score(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """Read the verdict after each prompt; see `VerdictEngine.score`.

        Raises:
            GuardError: one of several servers answers otherwise than another.
        """
        # The longest prompt of each group goes first, and leaves in the server's prefix cache what the others share.
        longest = [max((tuple(row) for row in group), key=len) for group in groups if group]
        rows = list(dict.fromkeys([*longest, *(tuple(row) for group in groups for row in group)]))
        verdicts = self._compare(rows[: self._replicas.wanted])
        rest = [row for row in rows if row not in verdicts]
        asked = dict(zip(rest, self._ask(rest), strict=True))
        self._replicas.learn(asked)
        verdicts |= asked
        return [[verdicts[tuple(row)] for row in group] for group in groups]

    def servers(self) -> tuple[ServerHealth, ...]:
        """(S,) what is known of each server."""
        return self._client.health()

    def _compare(self, rows: Sequence[Row]) -> dict[Row, Verdict]:
        """Ask every server; the verdicts of those prompts that one of them scored."""
        if not rows:
            return {}
        answers = self._client.post_each("/completions", self._bodies(rows), self._reader(rows))
        found, silent = self._replicas.compare(rows, answers)
        for address in silent:
            self._client.leave_out(address)
        return found

    def _ask(self, rows: Sequence[Row]) -> list[Verdict]:
        known = self._replicas.known
        trial = None
        if known is not None:
            row, verdict = known
            trial = Trial(self._body(row), lambda content: check_alike(self._read(content, len(row)), verdict))
        answers = self._client.post_all("/completions", self._bodies(rows), self._reader(rows), trial)
        return [Verdict(None, reason=answer.reason) if isinstance(answer, Unanswered) else answer for answer in answers]

    def _body(self, row: Row) -> dict[str, Any]:
        return {**self._request, "prompt": row}

    def _bodies(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [self._body(row) for row in rows]

    def _reader(self, rows: Sequence[Row]) -> Callable[[bytes, int], Verdict]:
        return lambda content, number: self._read(content, len(rows[number]))

    def _read(self, content: bytes, tokens: int) -> Verdict:
        answer = _Completion.model_validate_json(content)
        read = answer.usage.prompt_tokens if answer.usage else None
        if read is not None and read != tokens:
            raise BadAnswerError(
                f"it is about {read} tokens and the prompt has {tokens}, so the server changed the prompt"
            )
        found = {}
        for token, logprob in answer.choices[0].logprobs.top_logprobs[0].items():
            if (match := _TOKEN_ID.fullmatch(token)) is None:
                raise BadAnswerError(
                    "it names tokens by text; use a server that knows return_tokens_as_token_ids, such as vLLM"
                )
            found[int(match[1])] = logprob
        verdict = verdict_from_logprobs(found, self._labels)
        if verdict.reason is not None:
            raise BadAnswerError(verdict.reason)
        return verdict
