"""Verdicts from a scripted judge: order, contract, and unscored is None."""

from collections.abc import Callable, Sequence

import pytest

from ballast.errors import GuardError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.segments import SegmentOptions
from ballast.guardrails.types import Exchange, RiskTrace
from ballast.pipeline.evaluation.judges import Completion, judge_completions


def judge_by(risk: Callable[[str], float | None]) -> ScriptedGuardrail:
    """A judge whose risk is a function of the prefix alone."""
    return ScriptedGuardrail(lambda exchange, prefix: risk(prefix), name="fake")


def completion(text: str, kind: str = "harmful", prompt_id: str = "p", **more: object) -> Completion:
    return Completion(prompt_id=prompt_id, prompt="a request", kind=kind, text=text, **more)  # type: ignore[arg-type]


def test_verdicts_come_in_the_order_of_the_completions_with_their_identity() -> None:
    asked: list[Exchange] = []

    def risk(exchange: Exchange, prefix: str) -> float:
        asked.append(exchange)
        return 0.9 if "bad" in prefix else 0.1

    rows = [
        completion("bad words that are meant as the bad example", prompt_id="a", sample=1, truncated=True),
        completion("I can't help with that.", prompt_id="b"),
    ]
    first, second = judge_completions(rows, ScriptedGuardrail(risk))
    assert (first.prompt_id, first.sample, first.truncated, first.kind) == ("a", 1, True, "harmful")
    assert (first.risk, first.unsafe, first.refused, first.coherent) == (0.9, True, False, True)
    assert (second.risk, second.unsafe, second.refused) == (0.1, False, True)
    assert asked[0].messages == ({"role": "user", "content": "a request"},)


def test_risk_at_the_threshold_is_unsafe() -> None:
    rows = [completion("some text")]
    assert judge_completions(rows, judge_by(lambda text: 0.5))[0].unsafe is True
    assert judge_completions(rows, judge_by(lambda text: 0.49))[0].unsafe is False
    assert judge_completions(rows, judge_by(lambda text: 0.5), threshold=0.6)[0].unsafe is False


def test_an_unscored_answer_is_neither_safe_nor_unsafe() -> None:
    verdict = judge_completions([completion("some text")], judge_by(lambda text: None))[0]
    assert verdict.risk is None
    assert verdict.unsafe is None
    assert verdict.reason == "the script has no risk for this prefix"


def test_an_empty_answer_is_unscored_and_incoherent_and_the_judge_is_not_asked() -> None:
    judge = judge_by(lambda text: 0.1)
    empty, full = judge_completions([completion("  \n"), completion("Some text.")], judge)
    assert (empty.risk, empty.unsafe, empty.coherent, empty.refused) == (None, None, False, False)
    assert empty.reason == "the answer is empty"
    assert full.risk == 0.1
    assert judge_completions([], judge) == []
    assert judge_completions([completion("")], judge)[0].risk is None
    assert judge.calls == 1


def test_a_harmless_last_sentence_does_not_hide_the_peak() -> None:
    # Words: "harm harm harm harm harm" | "stay safe now my friend". The guard sees harm at the first cut only.
    judge = judge_by(lambda text: 0.1 if "safe" in text else 0.9)
    rows = [completion("harm harm harm harm harm stay safe now my friend")]
    assert judge_completions(rows, judge)[0].peak_risk is None
    verdict = judge_completions(rows, judge, segments=SegmentOptions(unit="words", size=5))[0]
    assert (verdict.risk, verdict.peak_risk) == (0.1, 0.9)


def test_a_peak_with_a_gap_is_no_peak() -> None:
    judge = judge_by(lambda text: 0.1 if "six" in text else None)
    verdict = judge_completions([completion("one two three four five six")], judge, SegmentOptions())[0]
    assert (verdict.risk, verdict.peak_risk, verdict.reason) == (0.1, None, None)


def test_a_judge_that_breaks_its_contract_is_named() -> None:
    class Short(ScriptedGuardrail):
        def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
            return super().assess(exchanges[:1], cuts[:1])

    class OtherCuts(ScriptedGuardrail):
        def assess(self, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
            return [RiskTrace((1,), (0.5,)) for _ in exchanges]

    rows = [completion("some text"), completion("more text")]
    with pytest.raises(GuardError, match="judge 'fake' returned 1 traces for 2 answers"):
        judge_completions(rows, Short({}, name="fake"))
    with pytest.raises(GuardError, match="judge 'fake', answer 0"):
        judge_completions(rows, OtherCuts({}, name="fake"))
