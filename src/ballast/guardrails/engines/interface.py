"""What every engine speaks: rendered prompts in, verdicts out.

An engine runs one causal verdict guard. It is handed token ids and knows nothing of templates: a family
renders, an engine reads the next token's distribution after each prompt:

    risk = sum p(unsafe ids) / sum p(all label ids)        from raw logits

Prompts come in groups, one group an exchange and one prompt a cut: those of a group share a long beginning,
which the fast engines compute once. A group's prompts need not be prefixes of one another (every one ends
with the guard's own suffix, and a word cut in two is tokenised otherwise), so an engine compares ids and
never assumes.

Shape letters: N groups, K_n prompts of one group, L tokens of a prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

Ids: TypeAlias = Sequence[int]
Group: TypeAlias = Sequence[Ids]


@dataclass(frozen=True)
class Labels:
    """Token ids that begin a verdict.

    Attributes:
        safe: ids of a safe verdict, sorted; not empty.
        unsafe: ids of an unsafe verdict, sorted; not empty, disjoint from `safe`.
    """

    safe: tuple[int, ...]
    unsafe: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """What a guard says after one rendered prompt.

    Attributes:
        risk: P(unsafe) in [0, 1] among the labels; None if unscored.
        label_mass: share in [0, 1] of the next token's probability that lies on any label; None if unscored.
        reason: why it is unscored.
    """

    risk: float | None
    label_mass: float | None = None
    reason: str | None = None

    @staticmethod
    def of(risk: float, mass: float) -> "Verdict":
        """A verdict from what was computed; unscored where that is not finite."""
        if not (math.isfinite(risk) and math.isfinite(mass)):
            return Verdict(None, reason="the guard's logits are not finite")
        return Verdict(risk, label_mass=min(mass, 1.0))  # rounding can leave 1.0000001

    @staticmethod
    def too_long(tokens: int, context: int) -> "Verdict":
        """A prompt that the model cannot read whole is unscored, never shortened."""
        return Verdict(None, reason=f"the rendered prompt has {tokens} tokens and the guard reads {context}")


class VerdictEngine(Protocol):
    """Reads the verdict after each rendered prompt. Calls from several threads are the caller's to order."""

    name: str

    def score(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """Read the verdict after each prompt.

        Args:
            groups: (N, K_n, L) token ids that end exactly before the verdict. Equal prompts are scored once.

        Returns:
            (N, K_n) verdicts in the order given. What cannot be scored (a prompt longer than the context,
            logits that are not finite, a server that does not answer) is unscored with that as the reason,
            and costs no other prompt its verdict.
        """
        ...
