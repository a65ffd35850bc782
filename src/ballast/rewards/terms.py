"""Reward terms beside the guard's: each sees the completions and gives one number a row.

A term returns None for a row that it does not apply to (say, by the prompt's kind). What a term returned
last stays in `last`, since TRL keeps only the sum.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ballast.errors import ConfigError, RewardError
from ballast.rewards.coherence import coherence
from ballast.rewards.refusal import refusal_score


class RefusalReward:
    """Decline what is harmful, answer what is not: so that refusing everything does not win.

    On `harmful` prompts the degree of refusal in [0, 1]; on `ordinary` and `scary` ones, 1 - over_refusal * degree.

    Args:
        tokenizer: the policy's tokenizer, which the completions are decoded with.
        over_refusal: how many answered harmful prompts one refused harmless prompt weighs as much as. Where the term
            is normalised in each group alone, which holds prompts of one kind, it makes no difference.
    """

    def __init__(self, tokenizer: Any, over_refusal: float = 1.0) -> None:
        self.tokenizer = tokenizer
        self.over_refusal = over_refusal
        self.__name__ = "refusal"
        self.last: list[float | None] = []

    def __call__(self, completion_ids: Sequence[Sequence[int]], kind: Sequence[str], **_: Any) -> list[float | None]:
        """Score a batch as TRL hands it over; `kind` is a column of the data set."""
        degrees = [
            refusal_score(text) for text in self.tokenizer.batch_decode(list(completion_ids), skip_special_tokens=True)
        ]
        self.last = [
            degree if k == "harmful" else 1.0 - self.over_refusal * degree
            for degree, k in zip(degrees, kind, strict=True)
        ]
        return self.last


class CoherenceReward:
    """Fluent text of some length, in [0, 1], on every prompt: so that gibberish does not win.

    Args:
        tokenizer: the policy's tokenizer; a completion without an end-of-turn token counts as cut off.
        stop_ids: further tokens that end a turn, for models with several (`generation_config.eos_token_id`).
    """

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset({tokenizer.eos_token_id, *stop_ids})
        self.__name__ = "coherence"
        self.last: list[float | None] = []

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        """Score a batch as TRL hands it over."""
        texts = self.tokenizer.batch_decode(list(completion_ids), skip_special_tokens=True)
        cut_off = [len(ids) == 0 or ids[-1] not in self.stop_ids for ids in completion_ids]
        self.last = [coherence(text, truncated=cut).score for text, cut in zip(texts, cut_off, strict=True)]
        return self.last


class CheckedReward:
    """A user's reward function, whose NaN stops the run and names it, and whose answer is kept.

    Args:
        function: called as TRL calls reward functions; returns one number or None a completion.
        name: what metrics and errors call it.
        not_on: kinds of prompts on which the reward does not apply. It is a task's: paid on harmful prompts, it
            would pay for complying.

    Raises:
        ConfigError: the function is `async def`.
    """

    def __init__(
        self, function: Callable[..., Sequence[float | None]], name: str, not_on: Iterable[str] = ("harmful",)
    ) -> None:
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
            raise ConfigError(
                f"reward function '{name}' is `async def`: async reward functions are not supported here; wrap it in a "
                "plain function that waits for the answers"
            )
        self.function = function
        self.not_on = frozenset(not_on)
        self.__name__ = name
        self.last: list[float | None] = []

    def __call__(self, **batch: Any) -> list[float | None]:
        """Call the function on the whole batch; what it says about prompts of a kind in `not_on` becomes None.

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
        kinds = batch.get("kind") or [None] * expected
        self.last = [
            None if reward is None or kind in self.not_on else float(reward)
            for reward, kind in zip(rewards, kinds, strict=True)
        ]
        return self.last


def checked_terms(functions: Iterable[Any]) -> list[Any]:
    """Reward functions as terms that keep their last answer, each under a name of its own.

    Args:
        functions: terms, which stay as they are, and plain callables of TRL's form, which become a
            `CheckedReward` under their own name.

    Raises:
        ConfigError: a reward model or a name of one instead of a function; two terms of one name, or a name
            that is reserved; an `async def`.
    """
    terms: list[Any] = []
    taken = {"star": "the guard's reward"}
    for function in functions:
        # A reward model can be called too, but not with a batch of TRL's.
        if not callable(function) or hasattr(function, "forward"):
            raise ConfigError(
                f"reward_funcs: a {type(function).__name__} is no reward function; wrap it in one that takes completions and returns numbers"
            )
        known = hasattr(function, "last")
        term = function if known else CheckedReward(function, getattr(function, "__name__", type(function).__name__))
        name = term.__name__
        owner = {"refusal": RefusalReward, "coherence": CoherenceReward}.get(name)
        if name in taken or (owner is not None and not isinstance(term, owner)):
            raise ConfigError(
                f"reward_funcs: the name '{name}' is taken by {taken.get(name, 'a built-in term')}, and metrics and "
                "tables go by name; rename your function"
            )
        taken[name] = "another term"
        terms.append(term)
    return terms


def load_reward_function(path: str) -> CheckedReward:
    """Import a user's reward function by `package.module:function`.

    Raises:
        ConfigError: the path has another form, or leads to nothing that can be called, or to an `async def`.
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
