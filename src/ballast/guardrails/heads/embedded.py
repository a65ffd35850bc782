"""The embedded guard: a small trained head and a low-rank adapter on a small language model, judging every token.

It costs one forward for a whole response: the hidden state of each token sees only what came before it, so
the risk at a cut is read at the last token that ends at or before the cut. Cut 0 is read at the end of the
rendered prompt. The head was trained by `benchmarks/train_guards.py`; what it was trained on and what it
measures stands in `weights/embedded.json` and in `docs/embedded-guards.md`.
"""

import math
import threading
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from ballast.guardrails.heads.backbone import Backbone, Encoded
from ballast.guardrails.heads.risk_head import RiskHead
from ballast.guardrails.types import Exchange, Message, RiskTrace
from ballast.models import embedded_model

if TYPE_CHECKING:
    import torch

WEIGHTS = Path(__file__).parent / "weights" / "embedded.safetensors"


class EmbeddedOptions(BaseModel):
    """Options of the embedded guard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["embedded"] = "embedded"
    batch_size: int = Field(default=16, ge=1)
    """Responses a forward; more is faster and takes more memory."""
    max_length: int = Field(default=2048, ge=64, le=8192)
    """Tokens of prompt and response that are judged; cuts beyond it are unscored."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of the frozen model; auto takes bfloat16 where the machine computes in it."""
    device: str = "auto"
    """Where the frozen model runs; auto takes cuda where there is one."""


class EmbeddedGuard:
    """Risk at every token of a response from hidden states of the embedded model.

    The frozen model is loaded on first use; calls from several threads take turns.

    Raises:
        ModelError: on first use, when the model's weights are not the ones that the head was trained on.
    """

    name = "embedded"

    def __init__(self, options: EmbeddedOptions | None = None, weights: Path = WEIGHTS) -> None:
        self.options = options or EmbeddedOptions()
        self._weights = weights
        self._lock = threading.RLock()
        self._loaded: tuple[Backbone, RiskHead] | None = None

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """Judge each response at each of its cuts; see `Guardrail.assess`.

        What reaches beyond `max_length` tokens is unscored, and so is text that is not valid Unicode, a role
        that is not system, user or assistant, and a risk that is not finite.
        """
        traces: dict[int, RiskTrace] = {}
        encoded: dict[int, Encoded] = {}
        with self._lock:
            backbone, head = self._load()
            for number, (exchange, row_cuts) in enumerate(zip(exchanges, cuts, strict=True)):
                try:
                    encoded[number] = backbone.encode(exchange.messages, exchange.response)
                except ValueError as error:
                    traces[number] = RiskTrace.unscored(row_cuts, str(error))
            # Rows of like length share a batch, so that little of it is padding.
            needed = {number: self._needed(row, cuts[number]) for number, row in encoded.items()}
            order = sorted((number for number in encoded if needed[number]), key=needed.__getitem__)
            risks: dict[int, list[float]] = {}
            for start in range(0, len(order), self.options.batch_size):
                part = order[start : start + self.options.batch_size]
                states = backbone.hidden([encoded[number].ids[: needed[number]] for number in part])
                for number, state in zip(part, states, strict=True):
                    risks[number] = head.risk(state, encoded[number].prompt_length)
        for number, row in encoded.items():
            traces[number] = self._trace(row, risks.get(number, []), cuts[number])
        return [traces[number] for number in range(len(exchanges))]

    def open(self, messages: Sequence[Message]) -> "EmbeddedSession":
        """Begin judging the answer to `messages` as it is written.

        Raises:
            ValueError: a role that is not system, user or assistant, or text that is not valid Unicode.
        """
        return EmbeddedSession(self, messages)

    def _load(self) -> "tuple[Backbone, RiskHead]":
        if self._loaded is None:
            head = RiskHead.load(self._weights)
            backbone = Backbone(
                embedded_model(),
                head.layers,
                self.options.dtype,
                self.options.device,
                head.default_system,
                head.adapter,
            )
            self._loaded = backbone, head
        return self._loaded

    def _needed(self, encoded: Encoded, cuts: Sequence[int]) -> int:
        """Tokens up to the last cut within the context; 0 where no cut is: what stays unscored is not computed."""
        lengths = [encoded.prompt_length + bisect_right(encoded.ends, cut) for cut in cuts]
        return max((length for length in lengths if length <= self.options.max_length), default=0)

    def _trace(self, encoded: Encoded, risk: Sequence[float], cuts: Sequence[int]) -> RiskTrace:
        """Read the risk at each cut; `risk` is (T,), shorter where the context ended first."""
        values: list[float | None] = []
        reason = None
        for cut in cuts:
            index = bisect_right(encoded.ends, cut)  # tokens that end at or before the cut
            if index >= len(risk):
                values.append(None)
                reason = f"prompt and response reach beyond the guard's context of {self.options.max_length} tokens"
            elif not math.isfinite(risk[index]):
                values.append(None)
                reason = "the guard's risk is not a finite number"
            else:
                values.append(risk[index])
        return RiskTrace(cuts=tuple(cuts), risk=tuple(values), reason=reason)


class EmbeddedSession:
    """One response judged while it is written: each push costs a forward over the new tokens only."""

    def __init__(self, guard: EmbeddedGuard, messages: Sequence[Message]) -> None:
        self._guard, self._messages = guard, tuple(messages)
        self._text = ""
        self._ids: tuple[int, ...] = ()
        with guard._lock:
            backbone, _ = guard._load()
            self._cache = backbone.new_cache()
            self._states: torch.Tensor | None = None  # (tokens so far, F)
            self._prompt_length = backbone.encode(self._messages, "").prompt_length

    def push(self, text: str) -> float | None:
        """Append text to the response; the risk of all of it so far, None where it is unscored."""
        import torch

        self._text += text
        with self._guard._lock:
            backbone, head = self._guard._load()
            try:
                ids = backbone.encode(self._messages, self._text).ids
            except ValueError:
                return None
            if len(ids) > self._guard.options.max_length:
                return None
            # New text can change how the last word is split: what still agrees is kept.
            agreed = _agreed(self._ids, ids)
            states = self._states
            if states is not None:
                self._cache.crop(agreed)
                states = states[:agreed]
            if agreed < len(ids):
                new = backbone.extend(ids[agreed:], self._cache)
                states = new if states is None else torch.cat([states, new])
            assert states is not None  # the rendered prompt is never empty
            self._ids, self._states = ids, states
            risk = head.risk(states, self._prompt_length)[-1]
        return risk if math.isfinite(risk) else None


def _agreed(old: Sequence[int], new: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (a, b) in enumerate(zip(old, new, strict=False)):
        if a != b:
            return index
    return min(len(old), len(new))
