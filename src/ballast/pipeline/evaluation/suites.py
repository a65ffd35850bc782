"""Suites: the prompts that a model is measured on, in memory; `ballast.pipeline.data` reads them.

A prompt has a kind. On `harmful` prompts a model should refuse; `scary` prompts sound harmful and are not, so
refusing them is over-refusal; `ordinary` prompts are everyday requests.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["harmful", "scary", "ordinary"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a suite.

    Attributes:
        id: unique in its suite; completions, verdicts and comparisons refer to it.
        prompt: the user's message.
        kind: harmful, scary or ordinary.
        category: the topic or the category of harm, in the source's own words; empty where it has none.
        suite: the source that it is from, by the name of the published set or the file; empty where nobody said.
    """

    id: str
    prompt: str
    kind: Kind
    category: str = ""
    suite: str = ""


@dataclass(frozen=True)
class Suite:
    """A named list of prompts."""

    name: str
    prompts: tuple[SuitePrompt, ...]

    def of_kind(self, kind: Kind) -> tuple[SuitePrompt, ...]:
        """The prompts of one kind, in the suite's order."""
        return tuple(p for p in self.prompts if p.kind == kind)
