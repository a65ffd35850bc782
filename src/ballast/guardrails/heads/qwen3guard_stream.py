"""Qwen3Guard-Stream: a risk at every token of a response, from heads on a Qwen3 model, without remote code.

The published models bring their classes as remote code, which is not run here: the heads are rebuilt from the
weights' names and shapes and from config.json (technical report, arXiv 2510.14276).

    x = RMSNorm(W_pre h_t)      risk levels = softmax(W_risk x)      categories = softmax(W_category x)

with h_t the last hidden state. Risk is p(Unsafe), under `strict` p(Unsafe) + p(Controversial), and means
"unsafe by now". A token sees only what came before it, so one forward judges all cuts: the risk at a cut is
read at the last token that ends at or before it, at cut 0 at the end of the prompt. The `query_` heads, which
judge prompts, are not read.

The text of other models is encoded with this guard's tokenizer, and cuts are found by character offsets.

Shape letters: B rows of a batch, T response tokens + 1 (the end of the prompt comes first).
"""

import math
import re
import threading
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ballast.guardrails.families.frame import UnrenderableError
from ballast.guardrails.heads.qwen3guard_reader import StreamReader, TokenRisk
from ballast.guardrails.self_check import SelfCheck, check_order
from ballast.guardrails.types import Exchange, Message, RiskTrace

# A space before a letter ends a word for Qwen's tokenizer: what stands before it is encoded alike whatever follows.
_WORD_BORDER = re.compile(r"(?<=\S) (?=[^\W\d_])")


class Qwen3GuardStreamOptions(BaseModel):
    """Options of Qwen3Guard-Stream."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["qwen3guard_stream"] = "qwen3guard_stream"
    model: str = Field(
        default="Qwen/Qwen3Guard-Stream-0.6B", description="a hub id or a local folder of Qwen3Guard-Stream"
    )
    revision: str | None = Field(default=None, description="commit or tag of a hub id; None takes its default branch")
    mode: Literal["strict", "loose"] = Field(
        default="strict",
        description="what a controversial answer counts as: `strict` takes it for unsafe, `loose` for safe",
    )
    debounce: bool = Field(
        default=False,
        description="count a token's risk only as far as the token before it shares it, so that one alone raises no alarm",
    )
    self_check: SelfCheck = Field(
        default="strict",
        description="before the first use, judge one harmless and one harmful toy answer: `strict` refuses a guard that fails, `warn` logs it",
    )
    max_length: int = Field(
        default=8192, ge=64, description="tokens of prompt and response that are judged; cuts beyond are unscored"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="precision of the weights; the heads compute in float32"
    )
    device: str = Field(default="auto", description="where the guard runs; auto takes cuda where there is one")
    batch_size: int = Field(default=16, ge=1, description="responses a forward")


class Qwen3GuardStream:
    """Qwen3Guard-Stream: risk at every token, one forward a response; also while it is being written.

    The model is loaded, and checked on two toy exchanges, at first use; calls from several threads take turns.
    """

    def __init__(self, options: Qwen3GuardStreamOptions) -> None:
        self.options = options
        self.name = f"{options.type}:{options.model.rstrip('/').rsplit('/', 1)[-1]}"
        self._lock = threading.RLock()
        self._loaded: StreamReader | None = None

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """Judge each response at each of its cuts; see `Guardrail.assess`.

        What reaches beyond `max_length` tokens is unscored, and so is text that is not valid Unicode, a role that
        is not system, user or assistant, and a risk that is not finite. Categories are the model's own, where the
        risk is 0.5 or more.

        Raises:
            GuardError: at first use, when the guard fails its self-check.
            ModelError: at first use, when the folder holds no Qwen3Guard-Stream.
        """
        with self._lock:
            return self._assess(self._reader(), exchanges, cuts)

    def open(self, messages: Sequence[Message]) -> "Qwen3GuardStreamSession":
        """Begin judging the answer to `messages` as it is written; each push runs its new tokens only.

        Raises:
            ValueError: a role that is not system, user or assistant, or text that is not valid Unicode.
        """
        with self._lock:
            return Qwen3GuardStreamSession(self, self._reader(), messages)

    def _reader(self) -> StreamReader:
        if self._loaded is None:
            options = self.options
            reader = StreamReader(
                options.model,
                options.revision,
                counted=("Unsafe", "Controversial") if options.mode == "strict" else ("Unsafe",),
                max_length=options.max_length,
                dtype=options.dtype,
                device=options.device,
                guard=self.name,
            )
            check_order(
                self.name,
                lambda exchanges, cuts: self._assess(reader, exchanges, cuts),
                self.options.self_check,
                "check that the weights are those of a published Qwen3Guard-Stream",
            )
            self._loaded = reader
        return self._loaded

    def _assess(
        self, reader: StreamReader, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]
    ) -> list[RiskTrace]:
        traces: dict[int, RiskTrace] = {}
        rows: dict[int, tuple[list[int], list[int], list[int]]] = {}  # prompt ids, response ids, response ends
        for number, (exchange, asked) in enumerate(zip(exchanges, cuts, strict=True)):
            try:
                rows[number] = (reader.prompt(exchange.messages), *reader.encode(exchange.response))
            except UnrenderableError as error:
                traces[number] = RiskTrace.unscored(asked, str(error))
        # Rows of like length share a batch, so that little of it is padding.
        order = sorted(rows, key=lambda number: len(rows[number][0]) + len(rows[number][1]))
        for start in range(0, len(order), self.options.batch_size):
            part = order[start : start + self.options.batch_size]
            batch = [[*rows[number][0], *rows[number][1]][: reader.context] for number in part]
            for number, read in zip(part, reader.run(batch), strict=True):
                prompt, _, ends = rows[number]
                traces[number] = self._trace(read[len(prompt) - 1 :], ends, cuts[number], reader)
        return [traces[number] for number in range(len(exchanges))]

    def _trace(
        self, read: Sequence[TokenRisk], ends: Sequence[int], cuts: Sequence[int], reader: StreamReader
    ) -> RiskTrace:
        risks: list[float | None] = []
        categories: list[str | None] = []
        reason = None
        for cut in cuts:
            index = bisect_right(ends, cut)  # tokens that end at or before the cut; 0 is the end of the prompt
            risk = self.at(read, index) if index < len(read) else None
            if index >= len(read):
                reason = f"prompt and response reach beyond the guard's context of {reader.context} tokens"
            elif risk is None:
                reason = "the guard's risk is not a finite number"
            risks.append(risk)
            flagged = risk is not None and risk >= 0.5
            categories.append(reader.categories[read[index].category] if flagged and reader.categories else None)
        category = tuple(categories) if reader.categories else ()
        return RiskTrace(cuts=tuple(cuts), risk=tuple(risks), reason=reason, category=category)

    def at(self, read: Sequence[TokenRisk], index: int) -> float | None:
        """The risk at one token, debounced if asked for; None where it is not finite."""
        near = [read[index].risk]
        if self.options.debounce and index > 0:
            near.append(read[index - 1].risk)
        return min(near) if all(math.isfinite(risk) for risk in near) else None


class Qwen3GuardStreamSession:
    """One response judged while it is written, linear in its length."""

    def __init__(self, guard: Qwen3GuardStream, reader: StreamReader, messages: Sequence[Message]) -> None:
        self._guard, self._reader = guard, reader
        self._cache = reader.new_cache()
        prompt = reader.prompt(messages)
        self._prompt_length = len(prompt)
        self._read = reader.extend(prompt, self._cache)[-1:] if len(prompt) <= reader.context else []
        # Words that are complete keep their tokens; the text after them is encoded again as it grows.
        self._settled: list[int] = []
        self._tail = ""
        self._ids: list[int] = []

    def push(self, text: str) -> float | None:
        """Append text to the response; the risk of all of it so far, None where it is unscored."""
        self._tail += text
        with self._guard._lock:
            try:
                self._settle()
                ids = [*self._settled, *self._reader.encode(self._tail)[0]]
            except UnrenderableError:
                return None
            if self._prompt_length + len(ids) > self._reader.context:
                return None
            agreed = next(
                (n for n, (a, b) in enumerate(zip(self._ids, ids, strict=False)) if a != b),
                min(len(self._ids), len(ids)),
            )
            if agreed < len(self._ids):
                self._cache.crop(self._prompt_length + agreed)
                self._read = self._read[: 1 + agreed]
            if agreed < len(ids):
                self._read += self._reader.extend(ids[agreed:], self._cache)
            self._ids = ids
            return self._guard.at(self._read, len(ids))

    def _settle(self) -> None:
        borders = [match.start() for match in _WORD_BORDER.finditer(self._tail)]
        if borders:
            self._settled += self._reader.encode(self._tail[: borders[-1]])[0]
            self._tail = self._tail[borders[-1] :]
