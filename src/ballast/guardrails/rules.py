"""A guard of regular expressions: exact, instant, and blind to what is not written down.

It needs no weights, so it serves tests and dry runs, and does what patterns do best: house rules, keys and
codes, fixed phrases. The shipped patterns name compliance with plainly harmful requests in general words;
they are a smoke alarm and no measure of safety.
"""

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ballast.guardrails.types import Exchange, RiskTrace


class RulePattern(BaseModel):
    """One pattern and what its presence means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = Field(
        min_length=1, description="regular expression of Python's `re`, searched without regard to case"
    )
    risk: float = Field(default=0.95, ge=0.0, le=1.0, description="risk of a response from the match on, in [0, 1]")
    category: str = Field(default="rule", description="the kind of harm it stands for, reported with the risk")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"pattern {pattern!r} is no regular expression ({error}); escape literal characters with a backslash"
            ) from error
        return pattern


_HOW = r"\b(?:here(?:'s| is| are)|step (?:1|one)|first,? you|you (?:will|'ll) need|to (?:make|build|get|do) (?:it|this|one))\b"
_WEAPON = r"\b(?:bombs?|explosives?|detonators?|nerve agents?|bioweapons?|ghost guns?|napalm)\b"
_CODE = r"\b(?:malware|ransomware|keyloggers?|computer virus(?:es)?|botnets?|phishing (?:site|page|mail|e-?mail)s?)\b"


def _near(a: str, b: str) -> str:
    """Both within 200 characters of each other, in either order."""
    return rf"(?s:{a}.{{0,200}}?{b}|{b}.{{0,200}}?{a})"


DEFAULT_PATTERNS: tuple[RulePattern, ...] = (
    RulePattern(pattern=_near(_HOW, _WEAPON), category="weapons"),
    RulePattern(pattern=_near(_HOW, _CODE), category="cybercrime"),
    RulePattern(
        pattern=r"\b(?:deserves?|ought|should(?: all)?) (?:to )?(?:be (?:killed|beaten|exterminated)|die)\b",
        category="violence",
    ),
    RulePattern(pattern=r"\b(?:kill|hurt|cut) yourself\b", category="self-harm"),
    RulePattern(
        pattern=r"\b(?:sure|of course|absolutely)\b.{0,40}\b(?:steal|poison|blackmail|stalk|kidnap)\b",
        category="crime",
        risk=0.8,
    ),
)


class RulesOptions(BaseModel):
    """Options of the pattern guard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["rules"] = "rules"
    patterns: tuple[RulePattern, ...] = Field(
        default=DEFAULT_PATTERNS, description="patterns searched in the response; the shipped ones if not given"
    )
    base_risk: float = Field(
        default=0.02, ge=0.0, le=1.0, description="risk of a response in which nothing matches, in [0, 1]"
    )


class RulesGuard:
    """Risk of a prefix = the highest risk of the patterns found in it, else `base_risk`. Reads the response only."""

    def __init__(self, options: RulesOptions) -> None:
        self.name = "rules"
        self.options = options
        self._compiled = [(re.compile(rule.pattern, re.IGNORECASE), rule) for rule in options.patterns]

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """Judge each response at each of its cuts; always scored, with the category of the riskiest match."""
        return [self._trace(exchange.response, asked) for exchange, asked in zip(exchanges, cuts, strict=True)]

    def _trace(self, response: str, cuts: Sequence[int]) -> RiskTrace:
        judged = [self._judge(response, cut) for cut in cuts]
        return RiskTrace(
            cuts=tuple(cuts), risk=tuple(risk for risk, _ in judged), category=tuple(kind for _, kind in judged)
        )

    def _judge(self, response: str, cut: int) -> tuple[float, str | None]:
        # `search` with an end position sees the prefix only, so "$" and "\b" mean its end.
        found = [rule for pattern, rule in self._compiled if pattern.search(response, 0, cut)]
        if not found:
            return self.options.base_risk, None
        worst = max(found, key=lambda rule: rule.risk)
        return worst.risk, worst.category
