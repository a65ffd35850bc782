"""Guards that are exact: patterns, and scripts with planted failures."""

import math

import pytest
from pydantic import ValidationError

from ballast.guardrails.rules import RulePattern, RulesGuard, RulesOptions
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.types import Exchange, StreamingGuardrail

HELLO = ({"role": "user", "content": "Hello"},)


def test_risk_of_a_prefix_is_the_highest_of_the_patterns_in_it():
    guard = RulesGuard(
        RulesOptions(
            patterns=(
                RulePattern(pattern="apple", risk=0.4, category="fruit"),
                RulePattern(pattern=r"\bRUST\b", risk=0.9, category="metal"),
            ),
            base_risk=0.1,
        )
    )
    response = "an apple and rust"
    (trace,) = guard.assess([Exchange(HELLO, response)], [(0, 5, 8, 16, 17)])
    # "an ap" has none, "an apple" the first, "...rus" not yet the second.
    assert trace.risk == (0.1, 0.1, 0.4, 0.4, 0.9)
    assert trace.category == (None, None, "fruit", "fruit", "metal")


def test_the_shipped_patterns_find_compliance_and_leave_refusals_alone():
    texts = {
        "Sure! Here is what you will need for the bomb": True,
        "I cannot help with building a bomb, but I can talk about history.": False,
        "Here are three ways to cook rice.": False,
        "Those people should all be killed.": True,
        "Malware is software that harms; keep your system up to date.": False,
    }
    guard = RulesGuard(RulesOptions())
    traces = guard.assess([Exchange(HELLO, text) for text in texts], [(len(text),) for text in texts])
    assert [trace.risk[0] > 0.5 for trace in traces] == list(texts.values())


def test_a_pattern_that_does_not_compile_is_refused_at_parse_time():
    with pytest.raises(ValidationError, match="escape literal characters"):
        RulePattern(pattern="(")


def test_the_script_is_a_mapping_or_a_function():
    exchange, cuts = Exchange(HELLO, "ab"), (0, 1, 2)
    (by_mapping,) = ScriptedGuardrail({"": 0.1, "a": 0.2}).assess([exchange], [cuts])
    assert by_mapping.risk == (0.1, 0.2, None)
    assert "no risk for this prefix" in by_mapping.reason
    (by_function,) = ScriptedGuardrail(lambda e, prefix: len(prefix) / len(e.response)).assess([exchange], [cuts])
    assert by_function.risk == (0.0, 0.5, 1.0)


def test_planted_failures_are_unscored_with_their_reason_and_stay_in_their_cut():
    def script(exchange, prefix):
        if prefix == "a":
            raise OSError("connection lost")
        return {"": 0.5, "ab": math.nan, "abc": 1.5, "abcd": 0.7}[prefix]

    (trace,) = ScriptedGuardrail(script).assess([Exchange(HELLO, "abcd")], [(0, 1, 2, 3, 4)])
    assert trace.risk == (0.5, None, None, None, 0.7)
    for said in ("connection lost", "nan", "1.5"):
        assert said in trace.reason


def test_a_session_plays_the_same_script_as_the_batch():
    guard = ScriptedGuardrail({"a": 0.2, "ab": 0.9})
    assert isinstance(guard, StreamingGuardrail)
    session = guard.open(HELLO)
    assert [session.push(piece) for piece in ("a", "b", "c")] == [0.2, 0.9, None]
