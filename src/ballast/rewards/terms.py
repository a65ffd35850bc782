"""Reward terms beside the guard's: each sees the completions and gives one number a row.

A term returns None for a row that it does not apply to (say, by the prompt's kind). What a term returned
last stays in `last`, since TRL keeps only the sum.
"""

import importlib
import importlib.metadata
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ballast.errors import BallastError, ConfigError, RewardError
from ballast.rewards.coherence import coherence
from ballast.rewards.conversation import as_messages
from ballast.rewards.refusal_guard import RefusalDetector, keyword_detector

ENTRY_POINT_GROUP = "ballast.rewards"


class RefusalReward:
    """Decline what is harmful, answer what is not: so that refusing everything does not win.

    On `harmful` prompts the degree of refusal in [0, 1]; on `ordinary` and `scary` ones, 1 - over_refusal * degree.

    Args:
        tokenizer: the policy's tokenizer, which the completions are decoded with.
        over_refusal: how many answered harmful prompts one refused harmless prompt weighs as much as. Where the term
            is normalised in each group alone, which holds prompts of one kind, it makes no difference.
        detector: says how much of a refusal an answer is; keywords by default. An answer of which it cannot say is one
            that the term does not apply to.
    """

    def __init__(self, tokenizer: Any, over_refusal: float = 1.0, detector: RefusalDetector = keyword_detector) -> None:
        self.tokenizer = tokenizer
        self.over_refusal = over_refusal
        self.detector = detector
        self.__name__ = "refusal"
        self.last: list[float | None] = []

    def __call__(
        self,
        completion_ids: Sequence[Sequence[int]],
        kind: Sequence[str],
        prompts: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Score a batch as TRL hands it over; `kind` is a column of the data set.

        Raises:
            GuardError: the detector is a guard, and leaves too much unscored or cannot tell a refusal.
        """
        texts = self.tokenizer.batch_decode(list(completion_ids), skip_special_tokens=True)
        conversations = [as_messages(prompt) for prompt in prompts] if prompts is not None else [()] * len(texts)
        self.last = [
            None if degree is None else degree if k == "harmful" else 1.0 - self.over_refusal * degree
            for degree, k in zip(self.detector(conversations, texts), kind, strict=True)
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


def load_reward_function(
    path: str, name: str | None = None, not_on: Iterable[str] = ("harmful",), key: str = "train.reward_functions"
) -> CheckedReward:
    """Import a user's reward function by `package.module:function`.

    Args:
        path: where it is.
        name: what metrics and errors call it; None takes the function's own name.
        not_on: kinds of prompts on which it does not apply.
        key: the configuration's key that holds the path, for messages.

    Raises:
        ConfigError: the path has another form, or leads to nothing that can be called, or to an `async def`.
    """
    module_name, _, attribute = path.partition(":")
    if not attribute:
        raise ConfigError(f"{key}: '{path}' is no import path; write package.module:function")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key}: '{path}' cannot be imported ({error}); check the name, and that it is on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(
            f"{key}: '{path}' is a {type(function).__name__}, not a function; name one that takes completions and returns numbers"
        )
    return CheckedReward(function, name or attribute, not_on)


def load_reward_plugin(
    plugin: str, options: Mapping[str, Any], name: str | None = None, not_on: Iterable[str] = ("harmful",)
) -> CheckedReward:
    """Make a reward function that an installed package brings by an entry point of the group `ballast.rewards`.

    Whatever the entry point names is called with the options as keyword arguments and must return a reward function
    in TRL's form.

    Raises:
        ConfigError: no such plug-in or two of one name, options that it does not take, or no function returned.
        RewardError: its code fails when it is imported or called.
    """
    points = [p for p in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP) if p.name == plugin]
    if len(points) != 1:
        names = sorted(p.name for p in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))
        known = f"installed are {', '.join(names)}" if names else "none is installed"
        found = "several packages bring one of this name" if points else f"no such plug-in; {known}"
        raise ConfigError(
            f"reward '{plugin}': {found}; install the one package that brings it by an entry point of the group '{ENTRY_POINT_GROUP}'"
        )
    target = points[0].value
    try:
        function = points[0].load()(**options)
    except BallastError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"reward '{plugin}': {target} does not take these options ({error}); see its documentation"
        ) from error
    except Exception as error:  # foreign code, which raises what it likes
        raise RewardError(
            f"reward '{plugin}': {target} could not be made ({type(error).__name__}: {error}); reinstall its package"
        ) from error
    if not callable(function):
        raise ConfigError(
            f"reward '{plugin}': {target} returned a {type(function).__name__}, not a function; its package must return "
            "one that takes completions and returns numbers"
        )
    return CheckedReward(function, name or plugin, not_on)
