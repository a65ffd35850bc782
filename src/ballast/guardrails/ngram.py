"""The n-gram guard: logistic regression on hashed words and characters of prompt and response.

Another kind of model than the embedded guard, on other features, trained on prompts which that one never saw:
the judge of runs that the embedded guard rewards. (What the two share stands in `docs/embedded-guards.md`.)
It needs numpy only, and judges more than a thousand short responses a second.

    s = sigmoid(a . prompt + mean(words of the prompt) + c)      how harmful the request looks
    risk = sigmoid(slope * (u . r + s * (v . r) + k * s + b) + offset)    r: the response up to the cut

`v` weighs the response's n-grams where the request looks harmful; `slope` and `offset` calibrate the result.
The table `words` holds one weight a word: a linear function of the word's static embedding in SmolLM2, fitted
with the rest, so that words that no training prompt holds have a weight, too.
Trained by `benchmarks/train_guards.py`; its rows and numbers stand in `heads/weights/ngram.json`.
"""

from __future__ import annotations

import math
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from ballast.guardrails.types import Exchange, Message, RiskTrace

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WEIGHTS = Path(__file__).parent / "heads" / "weights" / "ngram.safetensors"

RESPONSE_BUCKETS, PROMPT_BUCKETS, WORD_BUCKETS = 2**16, 2**15, 2**16
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_CHARACTERS = (3, 5)  # lengths of character n-grams: three to five
# Longer text is judged up to here: n-grams beyond it would change a normalised sum little, and cost time.
MAX_PROMPT = 8_000


class NgramOptions(BaseModel):
    """Options of the n-gram guard: it has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["ngram"] = "ngram"


@dataclass(frozen=True)
class HashedText:
    """The n-grams of a text as buckets, in the order in which they end.

    Attributes:
        buckets: (M,) bucket of each n-gram.
        ends: (M,) character offset where each ends, never decreasing.
    """

    buckets: npt.NDArray[np.int64]
    ends: list[int]

    def vector(self, cut: int, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Buckets and values of the text up to `cut`: 1 + log(count) each, scaled to length 1."""
        import numpy as np

        index, count = np.unique(self.buckets[: bisect_right(self.ends, cut)] % size, return_counts=True)
        value = 1.0 + np.log(count)
        return index, value / np.sqrt(np.sum(value**2)) if len(value) else value


def hash_text(text: str) -> HashedText:
    """Hash a text's words, word pairs and character n-grams with CRC-32: the same in every process.

    A word that is cut in its middle has not ended yet and does not count, so that the n-grams of a prefix
    are always a prefix of the n-grams.
    """
    import numpy as np

    grams = sorted(_grams(text), key=lambda gram: gram[0])
    buckets = np.array([zlib.crc32(gram.encode(errors="surrogatepass")) for _, gram in grams], dtype=np.int64)
    return HashedText(buckets=buckets, ends=[end for end, _ in grams])


def _grams(text: str) -> Iterator[tuple[int, str]]:
    previous = "^"
    for number, match in enumerate(_WORD.finditer(text)):
        word = match.group().lower()
        yield match.end(), f"1 {word}"
        yield match.end(), f"2 {previous} {word}"
        if number < 4:  # how an answer opens says most about a refusal
            yield match.end(), f"o{number} {word}"
        previous = word
    shortest, longest = _CHARACTERS
    for end in range(shortest, len(text) + 1):
        for length in range(shortest, min(longest, end) + 1):
            yield end, f"c {text[end - length : end].lower()}"


def word_buckets(text: str) -> list[int]:
    """Buckets of a text's words in the table `words`; punctuation has none."""
    words = [match.group().lower() for match in _WORD.finditer(text)]
    return [zlib.crc32(word.encode(errors="surrogatepass")) % WORD_BUCKETS for word in words if word[0].isalnum()]


def prompt_text(messages: Sequence[Message]) -> str:
    """The text that stands for a conversation: its last user turn."""
    turns = [message["content"] for message in messages if message["role"] == "user"]
    return turns[-1][:MAX_PROMPT] if turns else ""


class NgramModel:
    """The weights and the arithmetic of the n-gram guard.

    Args:
        weights: `prompt` (32768,), `words`, `response` and `product` (65536,), and the scalars `prompt_bias`,
            `harm` (k), `bias`, `slope`, `offset`, each (1,).
    """

    def __init__(self, weights: Mapping[str, npt.NDArray[np.floating]]) -> None:
        import numpy as np

        self.weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}

    @classmethod
    def load(cls, path: Path) -> NgramModel:
        """Read the weights from safetensors."""
        from safetensors.numpy import load_file

        return cls(load_file(path))

    def save(self, path: Path) -> None:
        """Write the weights as float16 safetensors."""
        import numpy as np
        from safetensors.numpy import save_file

        save_file({name: value.astype(np.float16) for name, value in self.weights.items()}, path)

    def harm(self, prompt: str) -> float:
        """How harmful a request looks, in (0, 1)."""
        index, value = hash_text(prompt).vector(len(prompt), PROMPT_BUCKETS)
        words = self.weights["words"][word_buckets(prompt)]
        logit = self.weights["prompt"][index] @ value + self.weights["prompt_bias"][0]
        return _sigmoid(float(logit + (words.mean() if len(words) else 0.0)))

    def risks(self, prompt: str, response: str, cuts: Sequence[int]) -> list[float]:
        """Risk of the response at each cut."""
        w, harm, hashed = self.weights, self.harm(prompt), hash_text(response)
        risks = []
        for cut in cuts:
            index, value = hashed.vector(cut, RESPONSE_BUCKETS)
            answer = float(w["response"][index] @ value + harm * (w["product"][index] @ value))
            logit = answer + harm * w["harm"][0] + w["bias"][0]
            risks.append(_sigmoid(float(w["slope"][0] * logit + w["offset"][0])))
        return risks


def _sigmoid(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-min(60.0, max(-60.0, logit))))


class NgramGuard:
    """Risk of a response from its n-grams and those of the last user turn."""

    name = "ngram"

    def __init__(self, options: NgramOptions | None = None, weights: Path = WEIGHTS) -> None:
        self.options = options or NgramOptions()
        self.model = NgramModel.load(weights)

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """Judge each response at each of its cuts; see `Guardrail.assess`."""
        return [
            RiskTrace(tuple(row), tuple(self.model.risks(prompt_text(exchange.messages), exchange.response, row)))
            for exchange, row in zip(exchanges, cuts, strict=True)
        ]
