"""Is the answer right? Scorers that compare a completion with a reference.

A scorer is a small object called with (completion, reference): a number in [0, 1]. What cannot be read as an
answer gets 0, not None: the task was set, and was not done.
"""

import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, Protocol

from ballast.rewards.extract import chosen_label, last_number
from ballast.rewards.matching import MAX_CHARACTERS, BoundedPattern

_MAX_ROUGE_WORDS = 1000  # the longest common subsequence takes words x words
_ARTICLES = frozenset(("a", "an", "the"))
_MEANING = frozenset("#%&@/")  # punctuation by Unicode that makes a difference: C#, 5%, yes/no


class Scorer(Protocol):
    """A completion against its reference."""

    def __call__(self, text: str, reference: Any) -> float:
        """The reward, in [0, 1]."""
        ...

    def problem(self, reference: Any) -> str | None:
        """Why a reference of the data set cannot be compared with; None where it can."""
        ...


def normalise_answer(text: str) -> str:
    """Without case, articles, white space and punctuation, as SQuAD's metric does; numbers stay what they are.

    A point between digits and a sign before one are kept, so that 10.5 is not 105. Articles are kept where nothing
    else is there: "A" may be an answer.
    """
    text = unicodedata.normalize("NFKC", text[:MAX_CHARACTERS]).replace("\u2212", "-").casefold()
    kept = []
    for i, char in enumerate(text):
        category = unicodedata.category(char)
        if category == "Cf":  # invisible
            continue
        if category.startswith("P") and char not in _MEANING:
            after_digit = i > 0 and text[i - 1].isdigit()
            before_digit = i + 1 < len(text) and text[i + 1].isdigit()
            sign = char == "-" and not (i > 0 and text[i - 1].isalnum())
            if not (before_digit and (after_digit or sign)):
                kept.append(" " if char in "-–—" else "")
                continue
        kept.append(char)
    words = "".join(kept).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


class ExactMatch:
    """1 where the completion is the reference.

    Args:
        match: `whole`, the whole completion; `last_line`, its last line with text; `anywhere`, the reference as whole
            words somewhere in it. The last is easy to please: a completion may list every answer there is.
        strict: compare the texts as they are, white space around them aside, instead of `normalise_answer`.
    """

    def __init__(self, match: Literal["whole", "last_line", "anywhere"] = "whole", strict: bool = False) -> None:
        self.match = match
        self.strict = strict

    def __call__(self, text: str, reference: Any) -> float:
        if self.match == "last_line":
            text = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        if len(text) > MAX_CHARACTERS:
            return 0.0
        given, wanted = self._form(text), self._form(str(reference))
        if self.match == "anywhere":
            return float(bool(wanted) and f" {wanted} " in f" {given} ")
        return float(given == wanted)

    def problem(self, reference: Any) -> str | None:
        return None if self._form(str(reference)) else "has no word left to compare with"

    def _form(self, text: str) -> str:
        if not self.strict:
            return normalise_answer(text)
        return " ".join(text.split()) if self.match == "anywhere" else text.strip()


class MultipleChoice:
    """1 where the completion chooses the reference's label, see `extract.chosen_label`.

    Args:
        labels: the labels. A reference is one of them, or its place in the list counted from 0 (a whole number).
    """

    def __init__(self, labels: Sequence[str] = ("A", "B", "C", "D")) -> None:
        self.labels = tuple(labels)

    def __call__(self, text: str, reference: Any) -> float:
        return float(chosen_label(text, self.labels) == self._label(reference))

    def problem(self, reference: Any) -> str | None:
        if self._label(reference) is not None:
            return None
        return f"is none of the labels {', '.join(self.labels)}, nor a place in them counted from 0"

    def _label(self, reference: Any) -> str | None:
        if isinstance(reference, int) and not isinstance(reference, bool):
            return self.labels[reference] if 0 <= reference < len(self.labels) else None
        wanted = str(reference).strip().strip("().").casefold()
        return next((label for label in self.labels if label.casefold() == wanted), None)


class Numeric:
    """1 where the last number of the completion is the last number of the reference, see `extract.last_number`.

    Args:
        tolerance: largest difference that counts as equal.
        relative_tolerance: the same, as a share of the reference; the larger of the two holds.
    """

    def __init__(self, tolerance: float = 1e-6, relative_tolerance: float = 0.0) -> None:
        self.tolerance = Fraction(tolerance)
        self.relative_tolerance = Fraction(relative_tolerance)

    def __call__(self, text: str, reference: Any) -> float:
        given, wanted = last_number(text), last_number(str(reference))
        if given is None or wanted is None:
            return 0.0
        return float(abs(given - wanted) <= max(self.tolerance, self.relative_tolerance * abs(wanted)))

    def problem(self, reference: Any) -> str | None:
        return None if last_number(str(reference)) is not None else "holds no number"


class Rouge:
    """ROUGE by the package `rouge-score`, on words of any script, the first 1,000 of each side.

    Args:
        variant: `rouge1` or `rouge2`, words or pairs of words in common; `rougeL`, the longest common subsequence.
        measure: precision, recall, or their harmonic mean. Recall alone grows with length.
    """

    def __init__(
        self,
        variant: Literal["rouge1", "rouge2", "rougeL"] = "rougeL",
        measure: Literal["precision", "recall", "fmeasure"] = "fmeasure",
    ) -> None:
        self.variant = variant
        self.measure = measure

    def __call__(self, text: str, reference: Any) -> float:
        score = self._scorer.score(str(reference), text)[self.variant]
        return float(getattr(score, self.measure))

    def problem(self, reference: Any) -> str | None:
        return None if _Words().tokenize(str(reference)) else "has no word to compare with"

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer  # takes seconds to import, nltk with it

        return RougeScorer([self.variant], tokenizer=_Words())


class _Words:
    """Words in the form of rouge-score's tokenizers; its own drops all that is not a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        words = unicodedata.normalize("NFKC", text[:MAX_CHARACTERS]).casefold()
        return "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in words).split()[
            :_MAX_ROUGE_WORDS
        ]


class AnyOf:
    """The best score against any of the references, each of which the scorer can read.

    Args:
        scorer: of one reference.
        extract: pattern whose last match, or its first group, is the part of the completion that is scored; a
            completion without one gets 0.
    """

    def __init__(self, scorer: Scorer, extract: str | None = None) -> None:
        self.scorer = scorer
        self.pattern = BoundedPattern(f"(?s){extract}") if extract else None

    def __call__(self, text: str, reference: Any) -> float:
        part = self.pattern.last(text) if self.pattern else text
        return 0.0 if part is None else max(self.scorer(part, one) for one in _references(reference))

    def problem(self, reference: Any) -> str | None:
        return next((why for one in _references(reference) if (why := self.scorer.problem(one))), None)


def _references(reference: Any) -> list[Any]:
    return list(reference) if isinstance(reference, list | tuple) else [reference]
