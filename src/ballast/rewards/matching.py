"""Regular expressions on text that a policy wrote: bounded in length and in time.

A pattern such as `(a|aa)+$` takes time exponential in the text, and a policy that is rewarded for a format will
sooner or later write the text that does it.
"""

import logging

import regex

MAX_CHARACTERS = 20_000
SECONDS = 0.25

_log = logging.getLogger(__name__)


class BoundedPattern:
    """A pattern that gives up in time; what it could not decide is no match.

    Args:
        pattern: of the package `regex`, which reads Python's own syntax and more.
        ignore_case: whether case makes no difference.
        seconds: processor time after which one search is given up.

    Raises:
        ValueError: the pattern is no regular expression.
    """

    def __init__(self, pattern: str, ignore_case: bool = False, seconds: float = SECONDS) -> None:
        try:
            self._compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
        except regex.error as error:
            raise ValueError(
                f"pattern {pattern!r} is no regular expression ({error}); escape literal characters with a backslash"
            ) from error
        self.pattern = pattern
        self.seconds = seconds
        self.given_up = 0

    def found(self, text: str, whole: bool = False) -> bool:
        """Whether the pattern is somewhere in the text, or is all of it. A text above the limit has no match."""
        if len(text) > MAX_CHARACTERS:
            return False
        search = self._compiled.fullmatch if whole else self._compiled.search
        try:
            return search(text, timeout=self.seconds) is not None
        except TimeoutError:
            self._give_up(len(text))
            return False

    def last(self, text: str) -> str | None:
        """The first group of the last match (all of the match in a pattern without groups), or None."""
        try:
            matches = list(self._compiled.finditer(text[-MAX_CHARACTERS:], timeout=self.seconds))
        except TimeoutError:
            self._give_up(len(text))
            return None
        if not matches:
            return None
        found: str | None = matches[-1].group(1 if self._compiled.groups else 0)
        return found

    def _give_up(self, length: int) -> None:
        self.given_up += 1
        if self.given_up == 1:  # once: a slow pattern is slow on every completion
            _log.warning(
                "pattern %r gave up after %s s on %d characters, which counts as no match; it backtracks without end: "
                "make nested repetitions possessive (`++`) or take them apart",
                self.pattern,
                self.seconds,
                length,
            )
