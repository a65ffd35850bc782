"""GuardReward: a guard as a reward, and the per-token signal behind it."""

import logging
from typing import Any

import pytest

from ballast.errors import GuardError, ModelError
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


class Raises:
    """Judges everything 0.25, and raises on any batch with the word in it."""

    name = "raises"

    def __init__(self, error: Exception, on: str) -> None:
        self.error, self.on, self.calls = error, on, 0

    def assess(self, exchanges: Any, cuts: Any) -> list[RiskTrace]:
        self.calls += 1
        if any(self.on in exchange.response for exchange in exchanges):
            raise self.error
        return [RiskTrace(tuple(row), (0.25,) * len(row)) for row in cuts]


def test_one_bad_row_does_not_cost_the_batch(tokenizer: Any) -> None:
    guard = Raises(ValueError("cannot read: one two three"), on="eleven")
    reward = GuardReward(guard, tokenizer)
    texts = ["one", TEXT, "two"]
    assert reward([PROMPT] * 3, [ids(tokenizer, text) for text in texts]) == [0.75, None, 0.75]
    assert guard.calls == 1 + 3  # the batch, then every row


def test_the_reason_of_an_unscored_row_quotes_no_text(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    reward = GuardReward(Raises(ValueError("cannot read: one two three"), on=""), tokenizer)
    assert reward([PROMPT] * 2, [ids(tokenizer, TEXT)] * 2) == [None, None]
    assert reward.last is not None
    assert [trace.reason for trace in reward.last.traces] == ["the guard raised ValueError"] * 2
    assert "ValueError" in caplog.text
    assert "one two" not in caplog.text


def test_our_own_errors_are_not_unscored_rows(tokenizer: Any) -> None:
    guard = Raises(ModelError("no weights; install them"), on="")
    with pytest.raises(ModelError, match="install them"):
        GuardReward(guard, tokenizer)([PROMPT] * 2, [ids(tokenizer, TEXT)] * 2)
    assert guard.calls == 1


@pytest.mark.parametrize("trainer", ["grpo", "rloo"])
def test_the_warning_of_stock_trl_loses_its_texts(
    tokenizer: Any, caplog: pytest.LogCaptureFixture, trainer: str
) -> None:
    GuardReward(ScriptedGuardrail({}), tokenizer)
    logger = logging.getLogger(f"trl.trainer.{trainer}_trainer")
    caplog.set_level(logging.WARNING, logger=logger.name)  # another test may have quieted the libraries
    logger.warning("All reward functions returned None for the following kwargs:\n{'prompt': 'Count.'}")
    logger.warning("something else")
    assert "texts withheld" in caplog.text
    assert "something else" in caplog.text
    assert "Count." not in caplog.text


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
