"""Reward terms beside the guard's: each sees the completions and gives one number a row.

A term returns None for a row that it does not apply to (say, by the prompt's kind). What a term returned
last stays in `last`, since TRL keeps only the sum.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from ballast.errors import ConfigError, RewardError
from ballast.rewards.coherence import coherence
from ballast.rewards.refusal import refusal_score


class RefusalReward:
    """Decline what is harmful, answer what is not: so that refusing everything does not win.

    On `harmful` prompts the degree of refusal in [0, 1]; on `ordinary` and `scary` ones, 1 minus it.

    Args:
        tokenizer: the policy's tokenizer, which the completions are decoded with.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.__name__ = "refusal"
        self.last: list[float | None] = []

    def __call__(self, completion_ids: Sequence[Sequence[int]], kind: Sequence[str], **_: Any) -> list[float | None]:
        """Score a batch as TRL hands it over; `kind` is a column of the data set."""
        degrees = [
            refusal_score(text) for text in self.tokenizer.batch_decode(list(completion_ids), skip_special_tokens=True)
        ]
        self.last = [degree if k == "harmful" else 1.0 - degree for degree, k in zip(degrees, kind, strict=True)]
        return self.last


class CoherenceReward:
    """Fluent text of some length, in [0, 1], on every prompt: so that gibberish does not win.

    Args:
        tokenizer: the policy's tokenizer; a completion without its end-of-turn token counts as cut off.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.__name__ = "coherence"
        self.last: list[float | None] = []

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        """Score a batch as TRL hands it over."""
        texts = self.tokenizer.batch_decode(list(completion_ids), skip_special_tokens=True)
        ends = [len(ids) == 0 or ids[-1] != self.tokenizer.eos_token_id for ids in completion_ids]
        self.last = [coherence(text, truncated=cut).score for text, cut in zip(texts, ends, strict=True)]
        return self.last


class CheckedReward:
    """A user's reward function, whose NaN stops the run and names it, and whose answer is kept.

    Args:
        function: called as TRL calls reward functions; returns one number or None a completion.
        name: what metrics and errors call it.
    """

    def __init__(self, function: Callable[..., Sequence[float | None]], name: str) -> None:
        self.function = function
        self.__name__ = name
        self.last: list[float | None] = []

    def __call__(self, **batch: Any) -> list[float | None]:
        """Call the function.

        Raises:
            RewardError: a number of rewards other than that of the completions, or one that is not finite.
        """
        rewards = list(self.function(**batch))
        expected = len(batch["completion_ids"])
        if len(rewards) != expected:
            raise RewardError(
                f"reward function '{self.__name__}' returned {len(rewards)} rewards for {expected} completions; return one each, None where it does not apply"
            )
        bad = [i for i, reward in enumerate(rewards) if reward is not None and not math.isfinite(reward)]
        if bad:
            raise RewardError(
                f"reward function '{self.__name__}' returned {rewards[bad[0]]} for completion {bad[0]} of the batch "
                f"({len(bad)} of {expected} are not finite); return a finite number, or None where it does not apply"
            )
        self.last = [None if reward is None else float(reward) for reward in rewards]
        return self.last


def load_reward_function(path: str) -> CheckedReward:
    """Import a user's reward function by `package.module:function`.

    Raises:
        ConfigError: the path has another form, or leads to nothing that can be called.
    """
    module_name, _, attribute = path.partition(":")
    if not attribute:
        raise ConfigError(f"train.reward_functions: '{path}' is no import path; write package.module:function")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"train.reward_functions: '{path}' cannot be imported ({error}); check the name, and that it is on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(
            f"train.reward_functions: '{path}' is a {type(function).__name__}, not a function; name one that takes completions and returns numbers"
        )
    return CheckedReward(function, attribute)
