"""Trusted text around untrusted text, as token ids.

A frame is a prompt with places for text to judge. The frame's own text is encoded special tokens and all;
what goes into a place is encoded with `split_special_tokens`, where a special token's name is plain text.
Nothing is ever formatted into a string, so braces and delimiters in the text to judge mean nothing.

Deviation from encoding the whole prompt as one string: pieces are encoded apart. White space of the frame
beside a place is encoded together with what fills it, since tokenizers merge it with its neighbour (` How`,
`.\\n\\n`), so ids are the native ones wherever the frame ends in white space or in a special token there.
"""

from collections.abc import Iterable, Sequence
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


class Frame:
    """A prompt with places for untrusted text.

    Args:
        tokenizer: the guard's tokenizer (transformers).
        pieces: (F + 1,) trusted text before, between and after the F places.
        guard: the guard's name, for messages.
    """

    def __init__(self, tokenizer: Any, pieces: Sequence[str], guard: str) -> None:
        self._tokenizer, self._guard = tokenizer, guard
        core, self._glue = _move_white_space(pieces)
        self._after_text = core[-1]
        self._pieces = [self._trusted(piece) for piece in core]
        used = {token_id for piece in self._pieces for token_id in piece}
        # What must never come out of untrusted text: special tokens, and the guard's own delimiters, since
        # `split_special_tokens` leaves those alone that are added but not special.
        self._delimiters = {
            token_id: str(token)
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if (token.special or token_id in used) and str(token).strip()
        }

    def fill(self, contents: Sequence[str]) -> list[int]:
        """Token ids with (F,) texts in the places.

        Raises:
            UnrenderableError: a text is not valid Unicode, or holds a delimiter that the tokenizer cannot take as text.
        """
        ids = list(self._pieces[0])
        for (head, tail), content, piece in zip(self._glue, contents, self._pieces[1:], strict=True):
            ids += self._untrusted(head + content + tail)
            ids += piece
        return ids

    def label_ids(self, labels: Sequence[str]) -> set[int]:
        """The token that each label begins with, in the place where the verdict stands.

        Raises:
            GuardError: a label is empty there, or melts into the end of the prompt.
        """
        ids, after = set(), self._pieces[-1]
        for label in labels:
            joined = self._trusted(self._after_text + label)
            if len(joined) <= len(after) or joined[: len(after)] != after:
                raise GuardError(
                    f"guardrail '{self._guard}': label {label!r} has no token of its own after the end of the prompt {self._after_text[-12:]!r}; "
                    f"move white space from the end of verdict_prefix to the start of the label"
                )
            ids.add(joined[len(after)])
        return ids

    def bos_problem(self) -> str | None:
        """What is wrong with the prompt's beginning, or None: a tokenizer's BOS must stand there exactly once."""
        bos = self._tokenizer.bos_token_id
        leading = 0
        while bos is not None and self._pieces[0][leading : leading + 1] == [bos]:
            leading += 1
        if leading > 1:
            return f"the prompt begins with {leading} BOS tokens; remove the one that stands in template or in the chat template"
        if adds_bos(self._tokenizer) and leading == 0:
            return f"the prompt does not begin with BOS, which this tokenizer asks for; begin template with {self._tokenizer.bos_token!r}"
        return None

    def _trusted(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

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


def _move_white_space(pieces: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces without the white space beside a place, and (F,) that white space before and after each place."""
    core, last = list(pieces), len(pieces) - 1
    heads, tails = [""] * last, [""] * last
    for number, piece in enumerate(pieces):
        if not piece.strip():
            continue  # nothing but white space: it has no other neighbour to be kept apart from
        start = len(piece) - len(piece.lstrip()) if number > 0 else 0
        end = len(piece.rstrip()) if number < last else len(piece)
        core[number] = piece[start:end]
        if number > 0:
            tails[number - 1] = piece[:start]
        if number < last:
            heads[number] = piece[end:]
    return core, list(zip(heads, tails, strict=True))


def _broken(text: str, delimiters: Iterable[str]) -> list[str]:
    """The text in parts, none of which holds a delimiter: each is cut after its first character."""
    cuts = {0, len(text)}
    for delimiter in delimiters:
        at = text.find(delimiter)
        while at >= 0:
            cuts.add(at + 1)
            at = text.find(delimiter, at + 1)
    ends = sorted(cuts)
    return [text[a:b] for a, b in pairwise(ends)]
