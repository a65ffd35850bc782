"""Rewards in a run's configuration: weights, the refusal detector, task rewards; docs/rewards.md says what each does.

rewards:
  refusal_by: {type: keywords}
  task:
    - {type: numeric, answer_column: answer, weight: 2.0}
    - {type: json, required_keys: [name, age]}
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from ballast.guardrails.registry import NestedGuardOptions
from ballast.pipeline.config_base import Component, Names
from ballast.pipeline.evaluation.suites import Kind
from ballast.rewards.matching import BoundedPattern
from ballast.rewards.refusal_guard import as_refusal_options

# Columns that the trainer, or TRL for it, hands to every reward itself.
_TAKEN = frozenset(
    ("prompt", "prompts", "prompt_id", "kind", "completion", "completions", "completion_ids", "image", "images")
) | {"tools", "environments", "trainer_state", "log_extra", "log_metric"}
_TERMS = ("star", "refusal", "coherence")


def _check_column(name: str) -> str:
    if name in _TAKEN:
        raise ValueError(f"the column name '{name}' is taken by the trainer; rename the column in the data")
    return name


def _check_pattern(pattern: str | None) -> str | None:
    if pattern is not None:
        BoundedPattern(pattern)
    return pattern


class TaskTerm(Component):
    """What every task reward has."""

    type: str
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z][A-Za-z0-9_-]*$",
        description="what metrics and tables call it; its type where left out",
    )
    weight: PositiveFloat = Field(1.0, description="its share in the sum of the normalised terms")
    kinds: tuple[Kind, ...] = Field(
        ("scary", "ordinary"), min_length=1, description="kinds of prompts that the task applies to"
    )

    @property
    def term_name(self) -> str:
        """What metrics, tables and errors call the term."""
        return self.name or self.type


class AnswerTerm(TaskTerm):
    """What every task reward has that compares with an answer in the data."""

    answer_column: str = Field(
        "answer", min_length=1, description="column of the right answer, or a list of right ones"
    )
    missing_answer: Literal["error", "skip"] = Field(
        "error", description="a prompt without an answer: stop before training, or leave the term out for it"
    )
    extract: str | None = Field(
        None,
        min_length=1,
        description="pattern whose last match, or its first group, is the part of a completion that is compared",
    )

    _column = field_validator("answer_column")(_check_column)
    _pattern = field_validator("extract")(_check_pattern)

    @field_validator("kinds")
    @classmethod
    def _never_on_harmful(cls, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if "harmful" in kinds:
            raise ValueError(
                "a right answer to a harmful prompt is help with it, and this reward would pay for that; leave harmful out"
            )
        return kinds


class ExactMatchTerm(AnswerTerm):
    """The same text as the answer, without regard to case, articles and punctuation."""

    type: Literal["exact_match"] = "exact_match"
    match: Literal["whole", "last_line", "anywhere"] = Field(
        "whole", description="where the answer has to be; anywhere is easy to please by listing many"
    )
    strict: bool = Field(False, description="true compares the texts as they are")


class ChoiceTerm(AnswerTerm):
    """The same label as the answer: A, B, C, or words such as yes and no."""

    type: Literal["choice"] = "choice"
    labels: Names = Field(
        ("A", "B", "C", "D"),
        min_length=2,
        description="the labels; the answer is one of them, or its place among them counted from 0",
    )

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        odd = [label for label in labels if not label.isalnum()]
        if odd:
            raise ValueError(
                f"the label '{odd[0]}' holds more than letters and digits, so it could not be found in a text"
            )
        if len({label.casefold() for label in labels}) < len(labels):
            raise ValueError("two labels differ in case alone, or not at all; give each another")
        return labels


class NumericTerm(AnswerTerm):
    """The same number as the answer; of both, the last number counts."""

    type: Literal["numeric"] = "numeric"
    tolerance: NonNegativeFloat = Field(1e-6, description="largest difference that counts as equal")
    relative_tolerance: NonNegativeFloat = Field(
        0.0, description="the same, as a share of the answer; the larger of the two holds"
    )


class RougeTerm(AnswerTerm):
    """Words or phrases in common with the answer, by rouge-score."""

    type: Literal["rouge"] = "rouge"
    variant: Literal["rouge1", "rouge2", "rougeL"] = Field(
        "rougeL", description="words, pairs of words, or the longest common subsequence"
    )
    measure: Literal["precision", "recall", "fmeasure"] = Field(
        "fmeasure", description="recall alone grows with length, precision alone falls with it"
    )


class RegexTerm(TaskTerm):
    """A form that a pattern describes."""

    type: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1, description="regular expression, as the package `regex` reads it")
    whole: bool = Field(False, description="true: it must match all of the completion")
    ignore_case: bool = Field(False, description="whether case makes no difference")

    _pattern = field_validator("pattern")(_check_pattern)


class JsonTerm(TaskTerm):
    """One JSON value and nothing else, bare or in a fence."""

    type: Literal["json"] = "json"
    required_keys: Names = Field((), description="keys that the object must have; a.b is the key b of the object a")
    json_schema: dict[str, Any] | None = Field(None, description="JSON Schema that the value must satisfy")

    @field_validator("json_schema")
    @classmethod
    def _is_a_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            from ballast.rewards.json_schema import check_schema  # its package is imported where it is used

            check_schema(schema)
        return schema


class UserTerm(TaskTerm):
    """What reward functions of a user's own have."""

    columns: Names = Field((), description="columns of the data that it reads, handed over as TRL does, by name")

    @field_validator("columns")
    @classmethod
    def _not_taken(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_check_column, columns))


class FunctionTerm(UserTerm):
    """A reward function in TRL's form, by its import path."""

    type: Literal["function"] = "function"
    path: str = Field(pattern=r"^[\w.]+:\w+$", description="package.module:function")

    @property
    def term_name(self) -> str:
        """The function's own name, where it is given no other."""
        return self.name or self.path.partition(":")[2]


class RewardPluginTerm(UserTerm):
    """A reward function that an installed package brings."""

    type: Literal["plugin"] = "plugin"
    plugin: str = Field(min_length=1, description="name of its entry point in the group `ballast.rewards`")
    options: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments, as its package documents them"
    )

    @property
    def term_name(self) -> str:
        """The plug-in's name, where it is given no other."""
        return self.name or self.plugin


TaskRewardConfig = Annotated[
    ExactMatchTerm | ChoiceTerm | NumericTerm | RougeTerm | RegexTerm | JsonTerm | FunctionTerm | RewardPluginTerm,
    Field(discriminator="type"),
]


def check_names(terms: Iterable[TaskTerm]) -> None:
    """Metrics and tables go by name, so no two terms may share one.

    Raises:
        ValueError: a name that is given twice, or is that of a built-in term.
    """
    taken = dict.fromkeys(_TERMS, "a built-in term")
    for term in terms:
        name = term.term_name
        if name in taken:
            raise ValueError(
                f"the {term.type} reward's name '{name}' is taken by {taken[name]}, and metrics and tables go by name; "
                "give it another with the key name"
            )
        taken[name] = "another task reward"


class KeywordRefusal(Component):
    """Refusals are found by keywords: English, instant."""

    type: Literal["keywords"] = "keywords"


class GuardRefusal(Component):
    """Refusals are found by a guard or classifier that says whether an answer declines.

    Its risk is read as P(the answer declines). `prompted` asks any causal model; without a template of its own it is
    given one. Guards that judge safety are refused: what they call unsafe is no refusal.
    """

    type: Literal["guard"] = "guard"
    guard: NestedGuardOptions = Field(
        description="options of the guard: prompted, classifier, rules, plugin, or several"
    )
    self_check: bool = Field(True, description="at first use, tell one refusal from one answer, or stop")

    @field_validator("guard", mode="before")
    @classmethod
    def _asks_for_refusals(cls, options: BaseModel | Mapping[str, Any] | str) -> BaseModel:
        return as_refusal_options(options)


RefusalConfig = Annotated[KeywordRefusal | GuardRefusal, Field(discriminator="type")]


class RewardConfig(Component):
    """Weights of the terms that are normalised, each on its own, and then added."""

    star: NonNegativeFloat = Field(1.0, description="lowest cleaned STAR of an answer to a harmful prompt")
    refusal: NonNegativeFloat = Field(1.0, description="decline harmful requests, answer the others")
    refusal_baseline: Literal["group", "batch"] = Field(
        "group",
        description="what the refusal term is compared with: the prompt's own group, or all completions of the step, "
        "which also presses on a group that refuses or answers as a whole",
    )
    over_refusal: PositiveFloat = Field(
        1.0,
        description="with refusal_baseline=batch: how many answered harmful prompts a refused harmless one weighs as much as",
    )
    refusal_opening: PositiveInt | None = Field(
        None,
        description="segments from the start of an answer that the refusal term is charged to, since there an answer "
        "declines or does not; null charges the whole answer",
    )
    refusal_by: RefusalConfig = Field(KeywordRefusal(), description="what says of an answer whether it declines")
    coherence: NonNegativeFloat = Field(0.5, description="fluent text of some length, on every prompt")
    task: tuple[TaskRewardConfig, ...] = Field((), description="rewards of a task: right answers, formats, functions")
    std_floor: PositiveFloat = Field(0.1, description="smallest spread of a group that a reward is divided by")
    star_std_floor: PositiveFloat = Field(
        0.1, description="the same for the star term, whose scores lie closer together; 0.05 is sharper, and noisier"
    )

    @model_validator(mode="after")
    def _refusing_everything_must_not_win(self) -> Self:
        if self.star > 0 and self.refusal == 0:
            raise ValueError(
                "rewards.refusal = 0 with rewards.star > 0 lets a policy win by refusing everything; "
                "set rewards.refusal above 0, or rewards.star to 0"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        check_names(self.task)
        return self
