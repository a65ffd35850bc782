"""The contract that every guard keeps, fake or real, as a function that anyone can run on theirs.

It sends ordinary and awkward exchanges through a guard and compares what comes back with what was asked.
It says nothing about how well a guard judges: only that its answers can be trusted to be answers.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ballast.errors import BallastError, GuardError
from ballast.guardrails.probes import AWKWARD, ORDINARY, RISKY, UNREADABLE
from ballast.guardrails.segments import cut_words
from ballast.guardrails.types import Exchange, Guardrail, RiskTrace

# Two risks this far apart belong to texts that the guard tells apart.
_APART = 0.1


@dataclass(frozen=True)
class ContractReport:
    """What a guard that kept the contract did.

    Attributes:
        name: the guard's name.
        checks: the rules that held, in the order they were checked.
        unscored: for each awkward exchange that the guard left (partly) unscored, its reason.
        label_mass: lowest label mass that a trace reported, in [0, 1]; None for guards without labels.
        max_difference: largest difference of a risk between calls that should agree.
        seconds: wall time of the whole check, loading included.
        call_seconds: wall time of one batch of all exchanges that are not awkward, once the guard is loaded.
        notes: rules that could not be tried on this guard, and why.
    """

    name: str
    checks: tuple[str, ...]
    unscored: dict[str, str] = field(default_factory=dict)
    label_mass: float | None = None
    max_difference: float = 0.0
    seconds: float = 0.0
    call_seconds: float = 0.0
    notes: tuple[str, ...] = ()


def check_guardrail(
    guard: Guardrail,
    *,
    exchanges: Sequence[Exchange] = ORDINARY,
    risky: Sequence[Exchange] = RISKY,
    tolerance: float = 0.02,
    on_held: Callable[[str], None] | None = None,
) -> ContractReport:
    """Check that a guard keeps the contract.

    Args:
        guard: the guard.
        exchanges: ordinary exchanges, two or more, each of which the guard is expected to be able to judge.
        risky: more of them, of which the guard finds one riskier than some of the others: where all risks are alike,
            a mistake does not show. One rule then cannot be tried at all, and a note says so.
        tolerance: largest difference between two risks of the same prefix that counts as equal. Arithmetic
            in 16 bits differs by about 0.01 between batches of different sizes.
        on_held: called with each rule as soon as it held: a large guard takes minutes.

    Returns:
        What was checked and seen.

    Raises:
        GuardError: the first rule that does not hold, with what was asked and what came back.
    """
    started = time.perf_counter()
    check = _Check(guard, tolerance, on_held)
    check.shape_of_the_guard()
    exchanges = [*exchanges, *risky]
    cuts = [_cuts(exchange.response) for exchange in exchanges]
    first = check.ordinary(exchanges, cuts)
    check.determinism(exchanges, cuts, first)
    check.single_equals_batch(exchanges, cuts, first)
    check.order(exchanges, cuts, first)
    check.other_cuts(exchanges, cuts, first)
    check.prefix_alone(exchanges, cuts, first)
    check.awkward(exchanges[0], cuts[0], first[0])
    check.nothing_invented(exchanges)
    return ContractReport(
        name=check.name,
        checks=tuple(check.held),
        unscored=check.unscored,
        label_mass=check.label_mass,
        max_difference=check.difference,
        seconds=time.perf_counter() - started,
        call_seconds=check.call_seconds,
        notes=tuple(check.notes),
    )


def _cuts(response: str) -> tuple[int, ...]:
    """Cuts with a leading 0, few where the response is long: a slow guard is checked in seconds, too."""
    cuts = cut_words(response, 3)
    return tuple(sorted({0, *cuts} if len(response) < 1000 else {0, cuts[0], cuts[-1]}))


class _Check:
    """One run of the contract; every method is one rule."""

    def __init__(self, guard: Guardrail, tolerance: float, on_held: Callable[[str], None] | None) -> None:
        self.guard, self.tolerance, self.on_held = guard, tolerance, on_held
        self.name = str(getattr(guard, "name", type(guard).__name__))
        self.held: list[str] = []
        self.notes: list[str] = []
        self.unscored: dict[str, str] = {}
        self.label_mass: float | None = None
        self.difference = 0.0
        self.call_seconds = 0.0

    def shape_of_the_guard(self) -> None:
        name = getattr(self.guard, "name", None)
        if not isinstance(name, str) or not name:
            self._fail(f"its `name` is {name!r}; give it a text that logs and reports can show")
        if not callable(getattr(self.guard, "assess", None)):
            self._fail("it has no method `assess(exchanges, cuts)`; see ballast.guardrails.types.Guardrail")
        if (answer := self._call("an empty batch", [], [])) != []:
            self._fail(f"an empty batch gave {answer!r}; return []")
        self._holds("has a name, and answers an empty batch with []")

    def ordinary(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        traces = self._traces("an ordinary batch", exchanges, cuts)
        for number, trace in enumerate(traces):
            if not trace.scored:
                self._fail(
                    f"ordinary exchange {number} is unscored ({trace.reason}); a guard must be able to judge short plain text"
                )
        self._holds("one trace an exchange with the cuts that were asked for, every risk in [0, 1]")
        return traces

    def determinism(
        self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]], first: Sequence[RiskTrace]
    ) -> None:
        # From another thread, since a trainer may call it from one.
        started = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(self._traces, "the same batch from another thread", exchanges, cuts).result()
        self.call_seconds = time.perf_counter() - started  # the guard is loaded by now
        self._same("the same batch asked twice", first, again, "remove sampling and state from the guard")

    def single_equals_batch(
        self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]], first: Sequence[RiskTrace]
    ) -> None:
        alone = [self._traces("one exchange alone", [e], [c])[0] for e, c in zip(exchanges, cuts, strict=True)]
        self._same("alone and in a batch", first, alone, "check padding, attention mask and position ids")

    def order(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]], first: Sequence[RiskTrace]) -> None:
        turned = self._traces("the batch in reverse", list(reversed(exchanges)), list(reversed(cuts)))
        self._same("in reverse order", first, list(reversed(turned)), "return the traces in the order of the exchanges")

    def other_cuts(
        self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]], first: Sequence[RiskTrace]
    ) -> None:
        # A risk belongs to its cut: which others are asked for, and how close they lie, must not reach it.
        last = self._traces("the last cut alone", exchanges, [c[-1:] for c in cuts])
        ends = [RiskTrace(t.cuts[-1:], t.risk[-1:], t.reason) for t in first]
        remedy = "score each cut by itself, whichever others are asked for"
        self._same("asked for the last cut alone", ends, last, remedy)
        shortest = min(range(len(exchanges)), key=lambda i: len(exchanges[i].response))
        every = tuple(range(len(exchanges[shortest].response) + 1))
        (dense,) = self._traces("a cut at every character", [exchanges[shortest]], [every])
        inside = [dense.risk[cut] for cut in cuts[shortest]]
        self._same(
            "asked for a cut at every character",
            [first[shortest]],
            [RiskTrace(first[shortest].cuts, tuple(inside), dense.reason)],
            remedy,
        )

    def prefix_alone(
        self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]], first: Sequence[RiskTrace]
    ) -> None:
        # risk_k is a statement about response[:cut_k]: what follows the cut must not reach it.
        pairs = [(e, cut) for e, row in zip(exchanges, cuts, strict=True) for cut in row]
        prefixes = [Exchange(e.messages, e.response[:cut]) for e, cut in pairs]
        asked = [(cut,) for _, cut in pairs]
        alone = self._traces("prefixes as responses of their own", prefixes, asked)
        reasons = [trace.reason for trace in first for _ in trace.cuts]
        risks = [risk for trace in first for risk in trace.risk]
        inside = [RiskTrace(a, (risk,), why) for a, risk, why in zip(asked, risks, reasons, strict=True)]
        self._same(
            "a prefix alone and inside its response",
            inside,
            alone,
            "judge response[:cut] only, never what comes after the cut",
        )

    def awkward(self, plain: Exchange, plain_cuts: Sequence[int], plain_trace: RiskTrace) -> None:
        for what, exchange in AWKWARD.items():
            # A plain neighbour in the same batch: one bad row never costs the others theirs.
            trace, beside = self._traces(what, [exchange, plain], [_cuts(exchange.response), plain_cuts])
            self._equal(f"beside {what}", [plain_trace], [beside], "keep a row that fails from failing its batch")
            if not trace.scored:
                self.unscored[what] = str(trace.reason)
            verdict = "scored" if trace.scored else "unscored, with a reason"
            self._holds(f"{what}: {verdict}, and a row beside it keeps its risk")

    def nothing_invented(self, exchanges: Sequence[Exchange]) -> None:
        """What a guard cannot read is unscored; a risk that does not depend on the text is invented."""
        risks = [t.risk[0] for t in self._traces("whole responses", exchanges, [(len(e.response),) for e in exchanges])]
        scored = [(risk, e) for risk, e in zip(risks, exchanges, strict=True) if risk is not None]
        (low, calm), (high, risky) = min(scored, key=_risk), max(scored, key=_risk)
        if high - low <= _APART:
            self.notes.append(
                f"whether a risk is invented for what cannot be read was not tried: all texts have a risk between {low:.3f} "
                f"and {high:.3f}; give check_guardrail an exchange that the guard finds `risky`"
            )
            return
        for how, spoil in UNREADABLE.items():
            pair = [Exchange(e.messages, spoil(e.response)) for e in (calm, risky)]
            traces = self._traces(f"a text {how}", pair, [(len(e.response),) for e in pair])
            at_calm, at_risky = (trace.risk[0] for trace in traces)
            if at_risky is not None and (at_risky == 0.0 or at_risky == at_calm):
                same = "the same as a text of risk" if at_risky else "and so does a text of risk"
                self._fail(
                    f"a text of risk {high:.3f} gets exactly {at_risky} when {how}, {same} {low:.3f}: a risk that does not depend "
                    "on the text is invented; return None with a reason for what cannot be read"
                )
            self._holds(f"no risk is invented for a text {how}")

    def _holds(self, rule: str) -> None:
        self.held.append(rule)
        if self.on_held:
            self.on_held(rule)

    def _same(self, when: str, expected: Sequence[RiskTrace], got: Sequence[RiskTrace], remedy: str) -> None:
        self._equal(when, expected, got, remedy)
        self._holds(f"equal risks: {when}")

    def _equal(self, when: str, expected: Sequence[RiskTrace], got: Sequence[RiskTrace], remedy: str) -> None:
        for number, (a, b) in enumerate(zip(expected, got, strict=True)):
            for cut, x, y in zip(a.cuts, a.risk, b.risk, strict=True):
                difference = 0.0 if x is None and y is None else 1.0 if x is None or y is None else abs(x - y)
                if difference > self.tolerance:
                    self._fail(
                        f"exchange {number} at cut {cut} has risk {x} and, {when}, {y} (tolerance {self.tolerance}); {remedy}"
                    )
                self.difference = max(self.difference, difference)

    def _traces(self, what: str, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
        traces = self._call(what, exchanges, cuts)
        if not isinstance(traces, list) or len(traces) != len(exchanges):
            shown = f"{len(traces)} traces" if isinstance(traces, list) else f"a {type(traces).__name__}"
            self._fail(f"{what}: {len(exchanges)} exchanges gave {shown}; return a list with one RiskTrace each")
        for number, (trace, asked) in enumerate(zip(traces, cuts, strict=True)):
            self._trace(f"{what}, exchange {number}", trace, tuple(asked))
        return traces

    def _trace(self, what: str, trace: Any, asked: tuple[int, ...]) -> None:
        if not isinstance(trace, RiskTrace):
            self._fail(
                f"{what}: got a {type(trace).__name__}; return ballast.guardrails.types.RiskTrace, which checks itself"
            )
        if trace.cuts != asked:
            self._fail(
                f"{what}: asked for the cuts {_short(asked)}, got {_short(trace.cuts)}; return exactly those that were asked for"
            )
        if not trace.scored and not (trace.reason or "").strip():
            self._fail(f"{what}: a cut is unscored and `reason` is empty; say why, it is all that the user will see")
        if trace.category and len(trace.category) != len(asked):
            self._fail(
                f"{what}: {len(trace.category)} categories for {len(asked)} cuts; give one a cut, or none at all"
            )
        if trace.label_mass is not None:
            if not 0.0 <= trace.label_mass <= 1.0:
                self._fail(f"{what}: label_mass is {trace.label_mass}; it is a share of probability and lies in [0, 1]")
            self.label_mass = trace.label_mass if self.label_mass is None else min(self.label_mass, trace.label_mass)

    def _call(self, what: str, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> Any:
        call: Callable[..., Any] = self.guard.assess
        try:
            return call(exchanges, cuts)
        except BallastError:
            raise  # it already says what to do: a model that is missing, a self-check that failed
        except Exception as error:
            raise GuardError(
                f"guardrail '{self.name}': {what} raised {type(error).__name__}: {error}; return RiskTrace.unscored(cuts, reason) for what cannot be judged"
            ) from error

    def _fail(self, problem: str) -> None:
        raise GuardError(f"guardrail '{self.name}': {problem}")


def _risk(scored: tuple[float, Exchange]) -> float:
    return scored[0]


def _short(cuts: tuple[int, ...]) -> str:
    return str(cuts) if len(cuts) <= 6 else f"({', '.join(map(str, cuts[:3]))}, ..., {cuts[-1]}) of {len(cuts)}"
