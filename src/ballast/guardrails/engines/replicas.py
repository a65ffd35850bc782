"""Whether the servers of a guard are one guard: they must give the same prompts the same verdicts.

The first `_COMPARED` distinct prompts, those of the self-check before all others, are asked of every server. Prefixes
of ordinary rollouts are among them, on which two guards differ that agree on what is plain. Of what was scored, the
prompt with the risk nearest to one half is kept, as the question that a server must answer alike when it comes back
after it was left out: there another model, or other weights, would show most.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ballast.errors import GuardError
from ballast.guardrails.engines.call import Unanswered
from ballast.guardrails.engines.interface import Verdict
from ballast.guardrails.engines.request import BadAnswerError

Row: TypeAlias = tuple[int, ...]

_COMPARED = 32
# 16-bit logits of one model differ by up to 0.03 in the risk from one shape of a batch to another (docs/guard-engines.md).
_ALIKE = 0.1


def check_alike(verdict: Verdict, expected: Verdict) -> None:
    """Compare two verdicts on one prompt.

    Raises:
        BadAnswerError: risk or label mass differ by more than rounding explains.
    """
    if difference := _difference(verdict, expected):
        raise BadAnswerError(
            f"{difference}, on a prompt that it was asked before; another model is behind that address"
        )


def _difference(verdict: Verdict, expected: Verdict) -> str | None:
    for name, one, other in (
        ("risk", verdict.risk, expected.risk),
        ("label mass", verdict.label_mass, expected.label_mass),
    ):
        if one is not None and other is not None and abs(one - other) > _ALIKE:
            return f"its {name} is {one:.3f} and not {other:.3f}"
    return None


class Replicas:
    """What the servers of one guard were found to answer.

    Args:
        guard: its name, for messages.
        servers: how many there are.
    """

    def __init__(self, guard: str, servers: int) -> None:
        self._guard, self._several = guard, servers > 1
        self._seen = 0
        self.known: tuple[Row, Verdict] | None = None

    @property
    def wanted(self) -> int:
        """How many prompts are still to be asked of every server."""
        return max(0, _COMPARED - self._seen) if self._several else 0

    def compare(
        self, rows: Sequence[Row], answers: Mapping[str, Sequence[Verdict | Unanswered]]
    ) -> tuple[dict[Row, Verdict], list[str]]:
        """Compare what the servers say of the same prompts.

        Args:
            rows: (N,) prompts.
            answers: (N,) answers, by the server's address.

        Returns:
            The verdicts of the prompts that a server scored, and the addresses that gave no answer to some prompt.

        Raises:
            GuardError: a server answers otherwise than the first one that scored the prompt, or cannot answer at all
                what that one can.
        """
        found: dict[Row, Verdict] = {}
        silent: set[str] = set()
        for number, row in enumerate(rows):
            given = {address: answered[number] for address, answered in answers.items()}
            scored = {address: one for address, one in given.items() if isinstance(one, Verdict)}
            silent |= {address for address, one in given.items() if isinstance(one, Unanswered) and not one.wrong}
            if not scored:
                continue
            first, found[row] = next(iter(scored.items()))
            for address, one in given.items():
                self._check(address, one, first, found[row])
        self.learn(found)
        return found, sorted(silent)

    def _check(self, address: str, answer: Verdict | Unanswered, first: str, expected: Verdict) -> None:
        if isinstance(answer, Unanswered):
            problem = answer.reason if answer.wrong else None
        else:
            difference = _difference(answer, expected)
            problem = difference and f"{address} answers otherwise: {difference}"
        if problem:
            raise GuardError(
                f"guardrail '{self._guard}': {problem}, and {first} scores the same prompt; all servers of a guard must "
                "serve the same model under the same name: mend that server, or take it out of base_url"
            )

    def learn(self, verdicts: Mapping[Row, Verdict]) -> None:
        """Count what was scored, and keep the prompt that says most of it, until `_COMPARED` are seen."""
        if self._seen >= _COMPARED:
            return
        scored = {row: verdict for row, verdict in verdicts.items() if verdict.risk is not None}
        self._seen += len(scored)
        candidates = [*scored.items(), *([self.known] if self.known else [])]
        self.known = min(candidates, key=lambda one: abs((one[1].risk or 0.0) - 0.5), default=None)
