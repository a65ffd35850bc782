"""What every guardrail speaks: an exchange in, a risk trace out.

Words used everywhere: *cut*, a character offset where a prefix of the response ends; *risk*,
P(unsafe | prompt, response[:cut]) in [0, 1]; *unscored*, a cut that the guard could not judge. Unscored is
`None`: never 0, and never "safe".

Shape letters: N exchanges in a batch, K cuts of one response.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict, runtime_checkable


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True)
class Exchange:
    """One conversation and the (possibly partial) response to judge."""

    messages: tuple[Message, ...]
    response: str


@dataclass(frozen=True)
class RiskTrace:
    """One guard's judgement of one exchange.

    Attributes:
        cuts: (K,) character offsets into the response, strictly increasing; 0 (the empty response) is
            allowed as the first, the last is `len(response)`.
        risk: (K,) P(unsafe | prompt, response[:cut]) in [0, 1]; None where the guard could not say.
        reason: why something is None; required then.
        label_mass: share of probability on the verdict labels, a health figure of verdict guards; else None.
        category: (K,) the guard's own category of harm at each cut, or empty where it has none.
    """

    cuts: tuple[int, ...]
    risk: tuple[float | None, ...]
    reason: str | None = None
    label_mass: float | None = None
    category: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.risk) != len(self.cuts):
            raise ValueError(f"a risk trace needs one risk a cut; got {len(self.risk)} risks for {len(self.cuts)} cuts")
        if any(r is not None and not 0.0 <= r <= 1.0 for r in self.risk):  # NaN fails this too
            raise ValueError(f"risk must lie in [0, 1] or be None; got {self.risk}")
        if self.reason is None and any(r is None for r in self.risk):
            raise ValueError("a trace with an unscored cut must say why in `reason`")

    @property
    def scored(self) -> bool:
        """Whether every cut was scored."""
        return all(r is not None for r in self.risk)

    @staticmethod
    def unscored(cuts: Sequence[int], reason: str) -> "RiskTrace":
        """A trace of a guard that could not answer at all."""
        return RiskTrace(cuts=tuple(cuts), risk=(None,) * len(cuts), reason=reason)


@runtime_checkable
class Guardrail(Protocol):
    """A judge of responses at many cuts at once. May be called from a thread."""

    name: str

    def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        """Judge each response at each of its cuts.

        Args:
            exchanges: (N,) what to judge.
            cuts: (N, K_n) character offsets, strictly increasing, the last one `len(response)`.

        Returns:
            (N,) one trace an exchange, in the order given, with exactly the cuts that were asked for. What
            could not be scored is None with a reason; one bad row never costs the others theirs.
        """
        ...


class GuardSession(Protocol):
    """One response judged while it is being written."""

    def push(self, text: str) -> float | None:
        """Append text to the response; return the risk of all of it so far, or None if unscored."""
        ...


@runtime_checkable
class StreamingGuardrail(Guardrail, Protocol):
    """A guard that follows a response as it grows, linear in its length."""

    def open(self, messages: Sequence[Message]) -> GuardSession:
        """Begin a session for the answer to `messages`."""
        ...
