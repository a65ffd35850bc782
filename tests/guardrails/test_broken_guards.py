"""Guards broken as real ones break: each is refused, and told what it does and what to do instead.

Every one here is a sound guard with a single mistake, so that nothing but the mistake can make it fail.
"""

import json

import pytest

from ballast.errors import GuardError
from ballast.guardrails.contract import check_guardrail
from ballast.guardrails.probes import LONG
from ballast.guardrails.types import RiskTrace

HARMFUL = {"bomb": 0.9, "hurt": 0.6}


class SoundGuard:
    """The highest weight of the words in a prefix; beyond 10,000 characters unscored."""

    name = "sound"

    def assess(self, exchanges, cuts):
        return [self.trace(exchange, asked) for exchange, asked in zip(exchanges, cuts, strict=True)]

    def trace(self, exchange, cuts):
        risk = tuple(self.risk(exchange, cut) for cut in cuts)
        return RiskTrace(tuple(cuts), risk, "too long for this guard" if None in risk else None)

    def risk(self, exchange, cut):
        prefix = exchange.response[:cut]
        return None if len(prefix) > 10_000 else self.weigh(prefix)

    def weigh(self, text):
        return max((weight for word, weight in HARMFUL.items() if word in text), default=0.01)


class LooksPastTheCut(SoundGuard):
    """Reads the whole response at every cut, as one that forgets the causal mask does."""

    def risk(self, exchange, cut):
        return super().risk(exchange, len(exchange.response) if cut else 0)


class ZeroForWhatItCannotRead(SoundGuard):
    """A parse failure becomes "safe"."""

    def risk(self, exchange, cut):
        risk = super().risk(exchange, cut)
        return 0.0 if risk is None else risk


class HalfForWhatItCannotEncode(SoundGuard):
    """A failure becomes a number in the middle, which looks like a judgement."""

    def weigh(self, text):
        try:
            text.encode()
        except UnicodeEncodeError:
            return 0.5
        return super().weigh(text)


class RemembersEarlierCalls(SoundGuard):
    """Has a history of what it was shown, as a chat session that is never reset has."""

    def __init__(self):
        self.seen = 0

    def assess(self, exchanges, cuts):
        self.seen += len(exchanges)
        return super().assess(exchanges, cuts)

    def weigh(self, text):
        return min(1.0, super().weigh(text) + self.seen / 100)


class SortsTheBatch(SoundGuard):
    """Sorts a batch by length against padding, and forgets to sort back."""

    def assess(self, exchanges, cuts):
        order = sorted(range(len(exchanges)), key=lambda i: len(exchanges[i].response))
        risks = [[len(exchanges[i].response[:cut]) % 89 / 100 for cut in cuts[i]] for i in order]
        # The answers are handed out in the order of the lengths.
        return [
            RiskTrace(tuple(asked), tuple((row * len(asked))[: len(asked)]))
            for asked, row in zip(cuts, risks, strict=True)
        ]


class LosesTheBatchToASurrogate(SoundGuard):
    """Encodes the whole batch at once, as a client that sends it as one JSON body does."""

    def assess(self, exchanges, cuts):
        json.dumps([exchange.response for exchange in exchanges], ensure_ascii=False).encode()
        return super().assess(exchanges, cuts)


class UnscoresTheBatchForASurrogate(SoundGuard):
    """Catches its own failure, and leaves the whole batch unscored for one row of it."""

    def assess(self, exchanges, cuts):
        try:
            "".join(exchange.response for exchange in exchanges).encode()
        except UnicodeEncodeError:
            return [RiskTrace.unscored(asked, "not valid Unicode") for asked in cuts]
        return super().assess(exchanges, cuts)


class GivesNaN(SoundGuard):
    """Hands on what overflowed in 16 bits."""

    def risk(self, exchange, cut):
        return float("nan") if "\x00" in exchange.response else super().risk(exchange, cut)


class DropsACut(SoundGuard):
    """Has no answer for the empty prefix, and leaves its cut out instead of saying None."""

    def trace(self, exchange, cuts):
        return super().trace(exchange, [cut for cut in cuts if cut > 0] or [0])


class DependsOnTheOtherCuts(SoundGuard):
    """Reads a cut in the light of the one before it, as a mask with an off-by-one does."""

    def trace(self, exchange, cuts):
        reaches = [
            len(exchange.response[:cut]) - len(exchange.response[:before])
            for before, cut in zip((0, *cuts[:-1]), cuts, strict=True)
        ]
        return RiskTrace(tuple(cuts), tuple(reach % 50 / 50 for reach in reaches))


def test_the_guard_without_a_mistake_keeps_the_contract():
    report = check_guardrail(SoundGuard(), tolerance=0.0)
    assert list(report.unscored) == [f"a response of {LONG} characters"]
    assert report.notes == ()


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        (LooksPastTheCut, r"a prefix alone and inside its response.*judge response\[:cut\] only"),
        (ZeroForWhatItCannotRead, r"risk 0\.900 gets exactly 0\.0 when repeated.*invented; return None with a reason"),
        (HalfForWhatItCannotEncode, r"exactly 0\.5 when with a lone surrogate behind it.*does not depend on the text"),
        (RemembersEarlierCalls, r"the same batch asked twice.*remove sampling and state"),
        (SortsTheBatch, r"alone and in a batch|in reverse order"),
        (LosesTheBatchToASurrogate, r"a lone surrogate raised UnicodeEncodeError.*RiskTrace\.unscored\(cuts, reason\)"),
        (UnscoresTheBatchForASurrogate, r"beside a lone surrogate, None.*keep a row that fails from failing its batch"),
        (GivesNaN, r"a NUL character raised ValueError: risk must lie in \[0, 1\] or be None.*nan"),
        (DropsACut, r"asked for the cuts \(0, .*return exactly those that were asked for"),
        (DependsOnTheOtherCuts, r"asked for the last cut alone.*score each cut by itself"),
    ],
)
def test_a_broken_guard_is_refused_with_what_it_did_and_what_to_do(guard, message):
    with pytest.raises(GuardError, match=r"guardrail 'sound': .*") as caught:
        check_guardrail(guard())
    assert caught.match(message)


def test_what_a_guard_that_tells_nothing_apart_would_invent_is_not_tried_and_said_so():
    class Deaf(SoundGuard):
        def weigh(self, text):
            return 0.3

    (note,) = check_guardrail(Deaf()).notes
    assert "was not tried: all texts have a risk between 0.300 and 0.300" in note


def test_rules_are_told_as_soon_as_they_hold_and_none_after_a_failure():
    told = []
    with pytest.raises(GuardError):
        check_guardrail(RemembersEarlierCalls(), on_held=told.append)
    assert told == [
        "has a name, and answers an empty batch with []",
        "one trace an exchange with the cuts that were asked for, every risk in [0, 1]",
    ]
