"""Reward terms beside the guard's."""

from typing import Any

import pytest

from ballast.errors import ConfigError, RewardError
from ballast.rewards.terms import CheckedReward, CoherenceReward, RefusalReward, load_reward_function


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
