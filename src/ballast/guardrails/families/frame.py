"""Trusted text around untrusted text, as token ids.

A frame is a prompt with places for text to judge. Its own special tokens are written as ids; the plain text
between two of them, with what fills the places, is encoded with `split_special_tokens`, where a special
token's name is plain text. Tokenizers cut at special tokens before anything else, so the ids are those of the
whole prompt encoded as one string, unless the text to judge spells a token of the guard's.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from ballast.errors import GuardError
from ballast.guardrails.types import Message


class UnrenderableError(ValueError):
    """An exchange that a guard's prompt has no form for; the message is the reason shown to the user."""


class Renderer(Protocol):
    """How a family writes an exchange: one prompt a policy, each ending exactly before the verdict.

    Attributes:
        policies: (P,) names of the policies, or `(None,)` where the family has only one.
    """

    policies: tuple[str | None, ...]

    def render(self, messages: Sequence[Message], response: str) -> list[list[int]]:
        """(P,) token ids for one (partial) response.

        Raises:
            UnrenderableError: the family has no form for these messages, or the text is not valid Unicode.
        """
        ...

    def label_ids(self, labels: Sequence[str]) -> set[int]:
        """The token that each label begins with where the verdict stands; a GuardError where it has none."""
        ...

    def bos_problem(self) -> str | None:
        """What is wrong with the prompt's beginning, or None: a tokenizer's BOS must stand there exactly once."""
        ...


@dataclass(frozen=True)
class _Fixed:
    """Ids that are the same in every prompt."""

    ids: list[int]


@dataclass(frozen=True)
class _Open:
    """Plain text between two special tokens: trusted text, and places by their number."""

    parts: list[str | int]


class Frame:
    """A prompt with places for untrusted text.

    Args:
        tokenizer: the guard's tokenizer (transformers).
        pieces: (F + 1,) trusted text before, between and after the F places.
        guard: the guard's name, for messages.
    """

    def __init__(self, tokenizer: Any, pieces: Sequence[str], guard: str) -> None:
        self._tokenizer, self._guard = tokenizer, guard
        # White space is among the added tokens of some tokenizers; it delimits nothing.
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
        stretches = _stretches(pieces, added)
        own = {token_id for stretch in stretches if isinstance(stretch, _Fixed) for token_id in stretch.ids}
        # What must never come out of untrusted text: special tokens, and the guard's own delimiters, since
        # `split_special_tokens` leaves those alone that are added but not special.
        self._delimiters = {i: str(token) for i, token in added.items() if token.special or i in own}
        last = stretches[-1].parts[-1] if stretches and isinstance(stretches[-1], _Open) else ""
        self._ending = last if isinstance(last, str) else ""
        self._stretches = [
            part
            for number, stretch in enumerate(stretches, 1)
            for part in self._settled(stretch, self._closing if number == len(stretches) else self._trusted)
        ]

    def fill(self, contents: Sequence[str]) -> list[int]:
        """Token ids with (F,) texts in the places.

        Raises:
            UnrenderableError: a text is not valid Unicode, or holds a delimiter that the tokenizer cannot take as text.
        """
        ids: list[int] = []
        for stretch in self._stretches:
            if isinstance(stretch, _Fixed):
                ids += stretch.ids
            else:
                ids += self._untrusted("".join(p if isinstance(p, str) else contents[p] for p in stretch.parts))
        return ids

    def label_ids(self, labels: Sequence[str]) -> set[int]:
        """The token that each label begins with, in the place where the verdict stands.

        Raises:
            GuardError: a label is empty there, or melts into the end of the prompt.
        """
        ids, ending = set(), self._closing(self._ending)
        for label in labels:
            joined = self._trusted(self._ending + label)
            if len(joined) <= len(ending) or joined[: len(ending)] != ending:
                raise GuardError(
                    f"guardrail '{self._guard}': label {label!r} has no token of its own after the end of the prompt {self._ending[-12:]!r}; "
                    f"move white space from the end of verdict_prefix to the start of the label"
                )
            ids.add(joined[len(ending)])
        return ids

    def bos_problem(self) -> str | None:
        """What is wrong with the prompt's beginning, or None: a tokenizer's BOS must stand there exactly once."""
        bos, leading = self._tokenizer.bos_token_id, 0
        for stretch in self._stretches:
            if not isinstance(stretch, _Fixed) or stretch.ids != [bos]:
                break
            leading += 1
        if leading > 1:
            return f"the prompt begins with {leading} BOS tokens; remove the one that stands in template or in the chat template"
        if adds_bos(self._tokenizer) and leading == 0:
            return f"the prompt does not begin with BOS, which this tokenizer asks for; begin template with {self._tokenizer.bos_token!r}"
        return None

    def _settled(self, stretch: _Fixed | _Open, encode: Callable[[str], list[int]]) -> list[_Fixed | _Open]:
        """The same with as much as possible encoded now: all that has no place in or near it."""
        if isinstance(stretch, _Fixed):
            return [stretch]
        if all(isinstance(part, str) for part in stretch.parts):
            return [_Fixed(encode("".join(map(str, stretch.parts))))]
        first, last = stretch.parts[0], stretch.parts[-1]
        before, head = self._parted(first, last=True) if isinstance(first, str) else ("", "")
        tail, after = self._parted(last, last=False) if isinstance(last, str) else ("", "")
        middle: list[str | int] = [*stretch.parts]
        if isinstance(first, str):
            middle[0] = head
        if isinstance(last, str):
            middle[-1] = tail
        return [_Fixed(self._trusted(before)), _Open(middle), _Fixed(encode(after))]

    def _parted(self, text: str, *, last: bool) -> tuple[str, str]:
        """Trusted text in two where no token reaches across: between a letter and a line's end.

        Returns:
            What is before and after the last or first such border; all on the side of the place if there is none.
        """
        borders = [match.start() for match in re.finditer(r"(?<=[A-Za-z])(?=\n)", text)]
        for border in reversed(borders) if last else borders:
            parts = text[:border], text[border:]
            if [*self._trusted(parts[0]), *self._trusted(parts[1])] == self._trusted(text):
                return parts
        return ("", text) if last else (text, "")

    def _trusted(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _closing(self, text: str) -> list[int]:
        """Ids of the prompt's end as they are with a verdict behind it: some tokenizers join newlines only at an end."""
        word, joined = self._trusted("x"), self._trusted(text + "x")
        return joined[: -len(word)] if joined[-len(word) :] == word else self._trusted(text)

    def _untrusted(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnrenderableError("the text is not valid Unicode (a lone surrogate)") from error
        ids = self._split(text)
        if self._delimiters.keys().isdisjoint(ids):
            return ids
        broken = [token_id for part in _broken(text, self._delimiters.values()) for token_id in self._split(part)]
        if found := sorted(self._delimiters[i] for i in self._delimiters.keys() & set(broken)):
            raise UnrenderableError(f"the text holds the guard's delimiter {found[0]!r}, which cannot be shown as text")
        return broken

    def _split(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a BOS before a plain text."""
    return tokenizer.bos_token_id is not None and tokenizer.encode("x")[:1] == [tokenizer.bos_token_id]


def _stretches(pieces: Sequence[str], added: Mapping[int, Any]) -> list[_Fixed | _Open]:
    """Trusted pieces, and the places between them, cut at the added tokens that stand in the trusted text."""
    ids = {str(token): i for i, token in added.items()}
    # The longest first, as tokenizers do; some tokens take the white space beside them in.
    tokens = sorted(added.values(), key=lambda token: -len(str(token)))
    spelled = [r"\s*" * t.lstrip + f"(?P<t{n}>{re.escape(str(t))})" + r"\s*" * t.rstrip for n, t in enumerate(tokens)]
    pattern = re.compile("|".join(spelled) or r"(?!)")
    stretches: list[_Fixed | _Open] = []
    plain: list[str | int] = []
    for number, piece in enumerate(pieces):
        if number:
            plain.append(number - 1)
        start = 0
        for match in pattern.finditer(piece):
            plain.append(piece[start : match.start()])
            stretches += [_Open(plain), _Fixed([ids[str(match[match.lastgroup or 0])]])]
            plain, start = [], match.end()
        plain.append(piece[start:])
    return [s for s in (*stretches, _Open(plain)) if isinstance(s, _Fixed) or s.parts != [""]]


def _broken(text: str, delimiters: Iterable[str]) -> list[str]:
    """The text in parts, none of which holds a delimiter: each is cut after its first character."""
    cuts = {0, len(text)}
    for delimiter in delimiters:
        at = text.find(delimiter)
        while at >= 0:
            cuts.add(at + 1)
            at = text.find(delimiter, at + 1)
    return [text[a:b] for a, b in pairwise(sorted(cuts))]
