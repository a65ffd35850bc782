"""From the section `rewards` of a configuration to reward terms, and to the columns that they read."""

from collections.abc import Sequence
from typing import Any

from ballast.pipeline.config_rewards import (
    AnswerTerm,
    ChoiceTerm,
    ExactMatchTerm,
    FunctionTerm,
    GuardRefusal,
    JsonTerm,
    NumericTerm,
    RegexTerm,
    RewardConfig,
    RewardPluginTerm,
    RougeTerm,
    TaskTerm,
    UserTerm,
)
from ballast.pipeline.config_train import TrainConfig
from ballast.pipeline.data_columns import ColumnUse
from ballast.pipeline.evaluation.suites import KINDS
from ballast.rewards.formats import Format, ValidJson
from ballast.rewards.refusal_guard import GuardRefusalDetector, RefusalDetector, keyword_detector
from ballast.rewards.scorers import AnyOf, ExactMatch, MultipleChoice, Numeric, Rouge, Scorer
from ballast.rewards.task import TaskReward
from ballast.rewards.terms import CheckedReward, load_reward_function, load_reward_plugin


def task_rewards(terms: Sequence[TaskTerm], tokenizer: Any) -> list[TaskReward | CheckedReward]:
    """One reward term for each entry of `rewards.task`, in their order.

    Raises:
        ConfigError: a function or a plug-in that does not exist, or does not take its options.
        RewardError: a plug-in whose code fails.
    """
    return [_term(number, term, tokenizer) for number, term in enumerate(terms)]


def columns_read(terms: Sequence[TaskTerm]) -> list[ColumnUse]:
    """The columns of the data that the entries of `rewards.task` read."""
    uses = []
    for number, term in enumerate(terms):
        by, kinds = f"rewards.task[{number}] ({term.type})", frozenset(term.kinds)
        if isinstance(term, AnswerTerm):
            required = kinds if term.missing_answer == "error" else frozenset[str]()
            key = f"rewards.task[{number}].answer_column"
            uses.append(ColumnUse(term.answer_column, by, key, kinds, required, answer_scorer(term).problem))
        elif isinstance(term, UserTerm):
            key = f"rewards.task[{number}].columns"
            uses += [ColumnUse(column, by, key, kinds, frozenset()) for column in term.columns]
    return uses


def refusal_detector(rewards: RewardConfig, train: TrainConfig) -> RefusalDetector:
    """What `rewards.refusal_by` names; a guard's weights are loaded at its first use.

    Raises:
        ConfigError: a guard that does not exist, or does not take its options.
        GuardError: a plug-in that cannot be loaded.
    """
    options = rewards.refusal_by
    if not isinstance(options, GuardRefusal):
        return keyword_detector
    from ballast.guardrails.registry import load_guardrail

    return GuardRefusalDetector(load_guardrail(options.guard), train.max_unscored_share, options.self_check)


def answer_scorer(term: AnswerTerm) -> AnyOf:
    """The scorer of a term that compares with an answer."""
    scorer: Scorer
    match term:
        case ExactMatchTerm():
            scorer = ExactMatch(term.match, term.strict)
        case ChoiceTerm():
            scorer = MultipleChoice(term.labels)
        case NumericTerm():
            scorer = Numeric(term.tolerance, term.relative_tolerance)
        case RougeTerm():
            scorer = Rouge(term.variant, term.measure)
        case _:
            raise TypeError(f"no scorer for {type(term).__name__}")
    return AnyOf(scorer, term.extract)


def _term(number: int, term: TaskTerm, tokenizer: Any) -> TaskReward | CheckedReward:
    name, not_on = term.term_name, frozenset(KINDS) - frozenset(term.kinds)
    match term:
        case AnswerTerm():
            skip = term.missing_answer == "skip"
            return TaskReward(tokenizer, answer_scorer(term), name, term.answer_column, not_on, skip)
        case RegexTerm():
            return TaskReward(tokenizer, Format(term.pattern, term.whole, term.ignore_case), name, not_on=not_on)
        case JsonTerm():
            return TaskReward(tokenizer, ValidJson(term.required_keys, term.json_schema), name, not_on=not_on)
        case FunctionTerm():
            return load_reward_function(term.path, name, not_on, f"rewards.task[{number}].path")
        case RewardPluginTerm():
            return load_reward_plugin(term.plugin, term.options, name, not_on)
        case _:
            raise TypeError(f"no reward for {type(term).__name__}")
