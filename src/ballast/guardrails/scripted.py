"""A guard that says what a script says: for tests, demonstrations and planted failures.

It passes the same contract as a real guard (`contract.check_guardrail`), so what works with it works with
one, and its failures are the failures that real ones have.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from ballast.guardrails.types import Exchange, Message, RiskTrace

Script = Mapping[str, float | None] | Callable[[Exchange, str], float | None]


class ScriptedGuardrail:
    """Plays a script of risks.

    Args:
        script: a mapping from the prefix of the response to its risk (a prefix that is not in it is
            unscored), or a function of the exchange and the prefix. A cut for which the function raises,
            or gives None, NaN or a number outside [0, 1], is unscored with that as the reason.
        name: the guard's name.

    Attributes:
        calls: number of `assess` calls so far, for tests of caching and batching.
    """

    def __init__(self, script: Script, name: str = "scripted") -> None:
        self.name = name
        self.script = script
        self.calls = 0

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """Look every (exchange, prefix) up in the script."""
        self.calls += 1
        return [self._trace(exchange, asked) for exchange, asked in zip(exchanges, cuts, strict=True)]

    def open(self, messages: Sequence[Message]) -> "ScriptedSession":
        """Begin a streaming session that plays the same script."""
        return ScriptedSession(self, tuple(messages))

    def _trace(self, exchange: Exchange, cuts: Sequence[int]) -> RiskTrace:
        played = [self._play(exchange, exchange.response[:cut]) for cut in cuts]
        reasons = dict.fromkeys(reason for _, reason in played if reason)
        return RiskTrace(cuts=tuple(cuts), risk=tuple(risk for risk, _ in played), reason="; ".join(reasons) or None)

    def _play(self, exchange: Exchange, prefix: str) -> tuple[float | None, str | None]:
        try:
            risk = self.script(exchange, prefix) if callable(self.script) else self.script.get(prefix)
        except Exception as error:  # a planted failure: a guard reports what went wrong as a reason
            return None, f"the script raised {type(error).__name__}: {error}"
        if risk is None:
            return None, "the script has no risk for this prefix"
        if math.isnan(risk) or not 0.0 <= risk <= 1.0:
            return None, f"the script gave {risk}, which is no risk in [0, 1]"
        return float(risk), None


class ScriptedSession:
    """One response judged by the script while it grows."""

    def __init__(self, guard: ScriptedGuardrail, messages: tuple[Message, ...]) -> None:
        self._guard, self._messages, self._text = guard, messages, ""

    def push(self, text: str) -> float | None:
        """Append text; return the scripted risk of all of it so far, None where it is unscored."""
        self._text += text
        (trace,) = self._guard.assess([Exchange(self._messages, self._text)], [(len(self._text),)])
        return trace.risk[0]
