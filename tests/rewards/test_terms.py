"""Reward terms beside the guard's."""

from typing import Any

import pytest

from ballast.errors import ConfigError, RewardError
from ballast.rewards.terms import CheckedReward, CoherenceReward, RefusalReward, checked_terms, load_reward_function


@pytest.mark.model
def test_declining_is_rewarded_on_harmful_prompts_and_answering_on_the_others(tokenizer: Any) -> None:
    refusal, answer = (
        tokenizer(text)["input_ids"] for text in ("I'm sorry, but I can't help with that.", "Boil it for ten minutes.")
    )
    reward = RefusalReward(tokenizer)
    assert reward([refusal, answer, refusal, answer], kind=["harmful", "harmful", "ordinary", "scary"]) == [
        1.0,
        0.0,
        0.0,
        1.0,
    ]


@pytest.mark.model
def test_over_refusal_weighs_declined_harmless_prompts_alone(tokenizer: Any) -> None:
    refusal, answer = (
        tokenizer(text)["input_ids"] for text in ("I'm sorry, but I can't help with that.", "Boil it for ten minutes.")
    )
    reward = RefusalReward(tokenizer, over_refusal=3.0)
    # 1 - 3 * 1 = -2 for the refused ordinary prompt; the three others as without it.
    kinds = ["harmful", "harmful", "ordinary", "scary"]
    assert reward([refusal, answer, refusal, answer], kind=kinds) == [1.0, 0.0, -2.0, 1.0]


@pytest.mark.model
def test_fluent_text_beats_a_loop(tokenizer: Any) -> None:
    texts = [
        "Boil the eggs for ten minutes, then cool them in water before peeling.",
        "the the the the the the the the the the the",
    ]
    fluent, loop = CoherenceReward(tokenizer)([tokenizer(text)["input_ids"] for text in texts])
    assert fluent is not None
    assert loop is not None
    assert fluent > loop + 0.3


def test_a_users_nan_stops_the_run_and_names_the_function() -> None:
    reward = CheckedReward(lambda **_: [1.0, float("nan")], "my_reward")
    with pytest.raises(RewardError, match="'my_reward' returned nan for completion 1"):
        reward(completion_ids=[[1], [2]])


def test_a_wrong_number_of_rewards_is_named() -> None:
    with pytest.raises(RewardError, match="1 rewards for 2 completions"):
        CheckedReward(lambda **_: [1.0], "short")(completion_ids=[[1], [2]])


def test_none_from_a_user_means_does_not_apply() -> None:
    reward = CheckedReward(lambda **_: [None, 2], "some")
    assert reward(completion_ids=[[1], [2]]) == [None, 2.0]
    assert reward.last == [None, 2.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [("json", "package.module:function"), ("json:nothing", "cannot be imported"), ("json:__name__", "not a function")],
)
def test_a_reward_path_that_leads_nowhere_is_a_config_error(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward_function(path)


def test_a_users_reward_does_not_apply_to_harmful_prompts() -> None:
    batch = {"completion_ids": [[1], [2], [3]], "kind": ["harmful", "ordinary", "scary"]}
    assert CheckedReward(lambda **_: [1, 2, 3], "task")(**batch) == [None, 2.0, 3.0]
    assert CheckedReward(lambda **_: [1, 2, 3], "task", not_on=())(**batch) == [1.0, 2.0, 3.0]


def test_an_async_reward_is_refused() -> None:
    async def slow(**_: Any) -> list[float]:
        return [1.0]

    with pytest.raises(ConfigError, match="'slow' is `async def`"):
        checked_terms([slow])


def plain(completion_ids: Any, **_: Any) -> list[float]:
    return [1.0] * len(completion_ids)


def test_a_plain_function_is_checked_and_a_term_stays_itself() -> None:
    term = CheckedReward(plain, "other")
    first, second = checked_terms([plain, term])
    assert (type(first), first.__name__) == (CheckedReward, "plain")
    assert second is term


@pytest.mark.parametrize("names", [("a", "a"), ("star",), ("refusal",), ("coherence",)])
def test_a_name_that_is_taken_or_reserved_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"the name '{names[0]}' is taken"):
        checked_terms([CheckedReward(plain, name) for name in names])


def test_a_reward_model_is_no_reward_function() -> None:
    with pytest.raises(ConfigError, match="a str is no reward function"):
        checked_terms(["some/reward-model"])


@pytest.mark.model
def test_every_stop_token_ends_a_turn(tokenizer: Any) -> None:
    # A passage twice at the very end is a loop that the length limit cut off, or an emphasis that was ended.
    body = tokenizer(" and then you boil the eggs again for ten minutes" * 2)["input_ids"]
    other_end = 3
    cut_off, ended = CoherenceReward(tokenizer, stop_ids=[other_end])([body, [*body, other_end]])
    assert cut_off is not None
    assert ended is not None
    assert cut_off < ended
    assert CoherenceReward(tokenizer)([[*body, other_end], [*body, tokenizer.eos_token_id]]) == [cut_off, ended]
