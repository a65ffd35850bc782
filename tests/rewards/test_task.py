"""Task terms and the guard as refusal detector, as TRL calls them."""

from typing import Any

import pytest

from ballast.errors import ConfigError, DataError, GuardError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.rewards.refusal_guard import REFUSAL_TEMPLATE, GuardRefusalDetector, as_refusal_options
from ballast.rewards.scorers import AnyOf, Numeric
from ballast.rewards.task import TaskReward
from ballast.rewards.terms import RefusalReward, load_reward_plugin


class Words:
    """A tokenizer whose ids are the texts themselves."""

    def batch_decode(self, ids: list[list[str]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(row) for row in ids]


def numeric(**changes: Any) -> TaskReward:
    return TaskReward(Words(), AnyOf(Numeric()), "numeric", column="answer", **changes)


def test_a_task_is_none_on_harmful_prompts_and_0_where_it_was_not_done() -> None:
    reward = numeric()
    batch = {"kind": ["harmful", "ordinary", "scary"], "answer": [7, 7, 7]}
    assert reward([["7"], ["7"], ["no"]], **batch) == [None, 1.0, 0.0] == reward.last


def test_without_kinds_the_task_applies_everywhere() -> None:
    assert numeric()([["7"], [""]], answer=[7, 7]) == [1.0, 0.0]


def test_a_missing_column_is_named_with_those_that_there_are() -> None:
    with pytest.raises(DataError, match=r"'numeric' reads the column 'answer'.*it has gold, kind"):
        numeric()([["7"]], kind=["ordinary"], gold=[7])


def test_a_missing_answer_is_an_error_by_its_row_or_skipped() -> None:
    batch = {"kind": ["harmful", "ordinary"], "answer": [None, float("nan")], "prompt_id": ["mine-0", "mine-1"]}
    with pytest.raises(DataError, match="row mine-1 has nothing in column 'answer'"):
        numeric()([["7"], ["7"]], **batch)
    assert numeric(skip_missing=True)([["7"], ["7"]], **batch) == [None, None]


def test_a_plug_in_that_is_not_installed_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"reward 'none-such': no such plug-in.*'ballast.rewards'"):
        load_reward_plugin("none-such", {})


def declines(exchange: Any, prefix: str) -> float | None:
    """P(declines): by a word that no keyword list has."""
    if "broken" in prefix:
        return None
    return 0.9 if "weather" in prefix or "sorry" in prefix else 0.2


def test_a_guards_refusals_count_for_harmful_prompts_and_against_ordinary_ones() -> None:
    guard = ScriptedGuardrail(declines)
    reward = RefusalReward(Words(), detector=GuardRefusalDetector(guard))
    texts = [["weather"], ["bread"], ["weather"], ["bread"], [""]]
    kinds = ["harmful", "harmful", "ordinary", "scary", "ordinary"]
    # risk 0.9 declines, 0.2 answers; 1 minus it on ordinary and scary prompts; an empty answer declines nothing.
    expected = pytest.approx([0.9, 0.2, 0.1, 0.8, 1.0])
    assert reward(texts, kind=kinds, prompts=["q"] * 5) == expected
    # One call for the self-check and one for the batch, of the different answers alone.
    assert guard.calls == 2


def test_an_unscored_answer_is_none_and_too_many_stop_the_run() -> None:
    detector = GuardRefusalDetector(ScriptedGuardrail(declines), max_unscored_share=0.5)
    reward = RefusalReward(Words(), detector=detector)
    assert reward([["broken"], ["bread"]], kind=["ordinary"] * 2, prompts=["q"] * 2) == [None, pytest.approx(0.8)]
    with pytest.raises(GuardError, match=r"2 of 2 completions \(100%\) unscored as refusal detector"):
        reward([["broken"], ["broken"]], kind=["ordinary"] * 2, prompts=["q", "r"])


def test_a_guard_that_tells_no_refusal_is_refused_at_its_first_use() -> None:
    detector = GuardRefusalDetector(ScriptedGuardrail(lambda exchange, prefix: 0.5))
    with pytest.raises(GuardError, match=r"plain refusal 0\.500 and a plain answer 0\.500"):
        detector([[{"role": "user", "content": "q"}]], ["a"])


def test_a_prompted_guard_is_asked_for_refusals_and_safety_guards_are_refused() -> None:
    options: Any = as_refusal_options({"type": "prompted", "model": "m"})
    assert (options.template, options.self_check, options.unsafe_labels) == (REFUSAL_TEMPLATE, "off", ("Yes", "yes"))
    for wrong in ("embedded", {"type": "rules"}, {"type": "llama_guard", "model": "m"}):
        with pytest.raises(ValueError, match=r"safe|harm"):
            as_refusal_options(wrong)
    rules: Any = as_refusal_options({"type": "rules", "patterns": [{"pattern": "weather"}]})
    assert rules.patterns[0].pattern == "weather"
