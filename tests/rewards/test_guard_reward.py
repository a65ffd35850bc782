"""GuardReward: a guard as a reward, and the per-token signal behind it."""

from typing import Any

import pytest

from ballast.errors import GuardError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.types import Exchange, RiskTrace
from ballast.rewards.guard_reward import GuardReward

pytestmark = pytest.mark.model

TEXT = "one two three four five six seven eight nine ten eleven"
PROMPT = [{"role": "user", "content": "Count."}]


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_reward_is_the_lowest_cleaned_star(tokenizer: Any) -> None:
    # Segments end after five, ten and eleven words; risks .1, .8, .7 -> STAR .9, .2, .3;
    # debounced .9, max(.9,.2)=.9, last .3 -> lowest .3
    def risk(exchange: Exchange, prefix: str) -> float:
        return {0: 0.0, 5: 0.1, 10: 0.8, 11: 0.7}[len(prefix.split())]

    reward = GuardReward(ScriptedGuardrail(risk), tokenizer)
    assert reward([PROMPT], [ids(tokenizer, TEXT)]) == [pytest.approx(0.3)]
    assert reward.last is not None
    assert reward.last.traces[0].cuts == (0, len("one two three four five"), len(TEXT) - len(" eleven"), len(TEXT))
    assert set(reward.last.segments[0]) == {0, 1, 2}


def test_all_completions_are_judged_in_one_call(tokenizer: Any) -> None:
    guard = ScriptedGuardrail(lambda exchange, prefix: 0.5)
    GuardReward(guard, tokenizer)([PROMPT] * 3, [ids(tokenizer, TEXT)] * 3)
    assert guard.calls == 1


def test_a_guard_that_gives_nan_is_unscored_and_the_others_keep_theirs(tokenizer: Any) -> None:
    guard = ScriptedGuardrail(lambda exchange, prefix: float("nan") if "eleven" in exchange.response else 0.25)
    assert GuardReward(guard, tokenizer)([PROMPT] * 2, [ids(tokenizer, TEXT), ids(tokenizer, "one")]) == [None, 0.75]


def test_a_guard_that_raises_leaves_the_batch_unscored_with_its_reason(tokenizer: Any) -> None:
    class Down:
        name = "down"

        def assess(self, exchanges: Any, cuts: Any) -> list[RiskTrace]:
            raise TimeoutError("no answer in 5 s")

    reward = GuardReward(Down(), tokenizer)
    assert reward([PROMPT], [ids(tokenizer, TEXT)]) == [None]
    assert reward.last is not None
    assert reward.last.traces[0].reason == "TimeoutError: no answer in 5 s"


def test_a_guard_that_changes_the_cuts_is_named(tokenizer: Any) -> None:
    class Lossy:
        name = "lossy"

        def assess(self, exchanges: Any, cuts: Any) -> list[RiskTrace]:
            return [RiskTrace((0,), (0.0,))] * len(exchanges)

    with pytest.raises(GuardError, match="'lossy'"):
        GuardReward(Lossy(), tokenizer)([PROMPT], [ids(tokenizer, TEXT)])


def test_the_guard_reads_the_policys_own_tokens_and_not_parsed_messages(tokenizer: Any) -> None:
    read: list[str] = []

    def risk(exchange: Exchange, prefix: str) -> float:
        read.append(exchange.response)
        return 0.0

    GuardReward(ScriptedGuardrail(risk), tokenizer)(
        prompts=[PROMPT],
        completions=[[{"role": "assistant", "content": "something else"}]],
        completion_ids=[ids(tokenizer, "<think>hidden</think> shown")],
    )
    assert set(read) == {"<think>hidden</think> shown"}


def test_an_empty_completion_is_scored_as_its_prompt(tokenizer: Any) -> None:
    assert GuardReward(ScriptedGuardrail({"": 0.25}), tokenizer)([PROMPT], [[tokenizer.eos_token_id]]) == [0.75]
