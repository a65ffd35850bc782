"""A guard of weighted words: small enough to read, whole enough to pass `ballast guard check`."""

import math
import re
from collections.abc import Mapping, Sequence

from ballast import Exchange, RiskTrace

WORDS = {"bomb": 0.9, "hurt": 0.6, "poison": 0.7, "steal": 0.5}


class WatchlistGuard:
    """Risk of a prefix: 1 - product of (1 - weight) over the listed words in it, each counted once."""

    name = "watchlist"

    def __init__(self, words: Mapping[str, float] = WORDS, longest: int = 10_000) -> None:
        wrong = {word: weight for word, weight in words.items() if not 0.0 <= weight <= 1.0}
        if wrong:
            raise ValueError(f"weights lie in [0, 1]; got {wrong}")
        self.words = {word.lower(): weight for word, weight in words.items()}
        self.longest = longest

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """One trace an exchange, in the order given, one risk a cut."""
        return [self._trace(exchange.response, asked) for exchange, asked in zip(exchanges, cuts, strict=True)]

    def _trace(self, response: str, cuts: Sequence[int]) -> RiskTrace:
        risk = tuple(self._risk(response[:cut]) for cut in cuts)
        reason = f"longer than {self.longest} characters, all that this guard reads" if None in risk else None
        return RiskTrace(tuple(cuts), risk, reason)

    def _risk(self, prefix: str) -> float | None:
        if len(prefix) > self.longest:
            return None  # never a guess, and never 0: the caller must know
        found = self.words.keys() & set(re.findall(r"\w+", prefix.lower()))
        return 1.0 - math.prod(1.0 - self.words[word] for word in sorted(found))
