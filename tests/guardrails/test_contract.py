"""The contract lets sound guards pass and names what a broken one does."""

import itertools

import pytest

from ballast.errors import GuardError, ModelError
from ballast.guardrails.contract import check_guardrail
from ballast.guardrails.rules import RulesGuard, RulesOptions
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.types import RiskTrace


def sound(exchange, prefix):
    return len(prefix) % 97 / 100


def trace(exchange, cuts):
    return RiskTrace(tuple(cuts), tuple(sound(exchange, exchange.response[:cut]) for cut in cuts))


class Broken:
    """A sound guard whose `spoil` gets the traces of a call and may do anything with them."""

    name = "broken"

    def __init__(self, spoil):
        self.spoil = spoil

    def assess(self, exchanges, cuts):
        return self.spoil(exchanges, cuts, [trace(e, c) for e, c in zip(exchanges, cuts, strict=True)])


def test_the_fakes_and_the_rules_keep_the_contract():
    for guard in (ScriptedGuardrail(sound), RulesGuard(RulesOptions())):
        report = check_guardrail(guard, tolerance=0.0)
        assert report.name == guard.name
        assert report.unscored == {}
        assert report.max_difference == 0.0


def test_unscored_awkward_rows_keep_the_contract_and_are_reported():
    def script(exchange, prefix):
        return None if "\ud800" in prefix else 0.5

    report = check_guardrail(ScriptedGuardrail(script))
    assert list(report.unscored) == ["a lone surrogate"]


counter = itertools.count()

SPOILS = {
    "one trace is missing": (lambda e, c, t: t[:-1] if t else t, "one RiskTrace each"),
    "not a list": (lambda e, c, t: tuple(t) if t else t, "gave a tuple"),
    "dictionaries": (lambda e, c, t: [{"risk": x.risk} for x in t], "got a dict"),
    "other cuts": (lambda e, c, t: [RiskTrace(x.cuts[1:], x.risk[1:]) for x in t], "asked for the cuts"),
    "risk beyond 1": (
        lambda e, c, t: [RiskTrace(x.cuts, tuple(2.0 for _ in x.cuts)) for x in t],
        r"raised ValueError.*\[0, 1\]",
    ),
    "another answer each time": (
        lambda e, c, t: [RiskTrace(x.cuts, (next(counter) % 7 / 10,) * len(x.cuts)) for x in t],
        "asked twice.*sampling",
    ),
    "depends on the batch": (
        lambda e, c, t: [RiskTrace(x.cuts, (len(t) / 10,) * len(x.cuts)) for x in t],
        "alone and in a batch.*padding",
    ),
    "reads beyond the cut": (
        lambda e, c, t: [
            RiskTrace(x.cuts, (len(y.response) % 97 / 100,) * len(x.cuts)) for x, y in zip(t, e, strict=True)
        ],
        "inside its response.*response\\[:cut\\]",
    ),
    "never scores": (
        lambda e, c, t: [RiskTrace.unscored(x.cuts, "tired") for x in t],
        "ordinary exchange 0 is unscored .tired.",
    ),
    "empty reason": (lambda e, c, t: [RiskTrace.unscored(x.cuts, " ") for x in t], "`reason` is empty"),
    "label mass beyond 1": (
        lambda e, c, t: [RiskTrace(x.cuts, x.risk, label_mass=1.2) for x in t],
        "label_mass is 1.2",
    ),
    "a category too few": (lambda e, c, t: [RiskTrace(x.cuts, x.risk, category=("x",)) for x in t], "categories"),
    "crashes on a surrogate": (
        lambda e, c, t: [x.response.encode() for x in e] and t,
        "lone surrogate raised UnicodeEncodeError.*RiskTrace.unscored",
    ),
    "one bad row costs the others": (
        lambda e, c, t: (
            [RiskTrace.unscored(x.cuts, "batch lost") for x in t] if any("\x00" in x.response for x in e) else t
        ),
        "beside a NUL character.*failing its batch",
    ),
    "the empty batch": (lambda e, c, t: t or None, "empty batch"),
}


@pytest.mark.parametrize("fault", SPOILS)
def test_a_broken_guard_is_refused_and_told_what_is_wrong(fault):
    spoil, message = SPOILS[fault]
    with pytest.raises(GuardError, match=message):
        check_guardrail(Broken(spoil))


def test_traces_in_another_order_are_refused():
    class Sorting(Broken):
        def assess(self, exchanges, cuts):
            # Scores are computed for the batch sorted by length and never sorted back.
            order = sorted(range(len(exchanges)), key=lambda i: len(exchanges[i].response))
            scores = [len(exchanges[i].response) % 97 / 100 for i in order]
            return [RiskTrace(tuple(c), (s,) * len(c)) for c, s in zip(cuts, scores, strict=True)]

    with pytest.raises(GuardError, match="tolerance"):
        check_guardrail(Sorting(None))


def test_a_guard_without_a_name_is_refused():
    guard = Broken(lambda e, c, t: t)
    guard.name = ""
    with pytest.raises(GuardError, match="`name`"):
        check_guardrail(guard)


def test_an_error_that_says_what_to_do_passes_through():
    def missing(exchanges, cuts, traces):
        raise ModelError("model 'x': not there")

    with pytest.raises(ModelError, match="not there"):
        check_guardrail(Broken(missing))
