"""Prompts from a guard's own chat template, none of whose text is copied here.

The template is rendered with a sentinel in the place of each message's content. What stands around the
sentinels is the template's own text, hence trusted; contents never pass through the template, so nothing in
them can act on it. What the template does to the white space at the edges of a content is found by sentinels
that have some, and done likewise.
"""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ballast.errors import GuardError, ModelError
from ballast.guardrails.families.frame import Frame, UnrenderableError, adds_bos
from ballast.guardrails.types import Message

_SENTINEL = re.compile(r"ballastplace(\d{6})z")

# Templates that print a date are shown this one, so that a guard judges alike on every day.
_DATE = datetime.datetime(2025, 1, 1)
_FIXED_DATE: dict[str, Any] = {"date_string": _DATE.strftime("%d %b %Y"), "strftime_now": _DATE.strftime}

# Shapes of conversations whose frames are kept; each is a few kilobytes.
_KEPT = 256


@dataclass(frozen=True)
class _Place:
    """Where a content stands, and which characters the template strips off it (None: all white space)."""

    message: int
    left: str | None
    right: str | None

    def content(self, text: str) -> str:
        return text.lstrip(self.left).rstrip(self.right)


@dataclass(frozen=True)
class _Shape:
    """The frames (one a policy) and places of conversations with the same roles."""

    frames: tuple[Frame, ...]
    places: tuple[tuple[_Place, ...], ...]
    no_empty_response: str | None


class ChatRenderer:
    """Renders exchanges with the chat template of the guard's tokenizer; see `frame.Renderer`.

    A BOS is put in front where the tokenizer asks for one and the template writes none; white space in front
    of the template's own BOS is dropped. Contents are given as text, or as typed parts where the template
    shows only those.

    Args:
        tokenizer: the guard's tokenizer (transformers).
        guard: the guard's name, for messages.
        settings: variables of the template, one mapping a policy, by the policy's name (None for a guard with
            one policy).
        verdict_prefix: what the guard writes before its verdict.
        generation_prompt: whether the template opens the guard's turn.
        turns: picks the messages that the family shows, and refuses those that it has no form for.
        after: trusted turns after the response.

    Raises:
        ModelError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        guard: str,
        *,
        settings: Mapping[str | None, Mapping[str, Any]],
        verdict_prefix: str,
        generation_prompt: bool,
        turns: Callable[[Sequence[Message]], Sequence[Message]],
        after: Sequence[Message] = (),
    ) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                f"guardrail '{guard}': the model's tokenizer has no chat template, by which this family writes its prompts; "
                f"name a model that has one, or use a guard of type 'prompted' with a template of your own"
            )
        self.policies = tuple(settings)
        self._tokenizer, self._guard, self._settings = tokenizer, guard, tuple(settings.values())
        self._prefix, self._generation_prompt, self._after = verdict_prefix, generation_prompt, tuple(after)
        self._turns = turns
        self._shapes: dict[tuple[str, ...], _Shape | UnrenderableError] = {}

    def render(self, messages: Sequence[Message], response: str) -> list[list[int]]:
        """(P,) token ids; see `frame.Renderer.render`."""
        shown = self._turns(messages)
        shape = self._shape((*(message["role"] for message in shown), "assistant"))
        contents = [*(message["content"] for message in shown), response]
        filled = [[place.content(contents[place.message]) for place in places] for places in shape.places]
        if shape.no_empty_response and any(
            place.message == len(shown) and not text
            for places, texts in zip(shape.places, filled, strict=True)
            for place, text in zip(places, texts, strict=True)
        ):
            raise UnrenderableError(shape.no_empty_response)
        return [frame.fill(texts) for frame, texts in zip(shape.frames, filled, strict=True)]

    def label_ids(self, labels: Sequence[str]) -> set[int]:
        """The token that each label begins with; see `Frame.label_ids`.

        Raises:
            GuardError: a label has no token of its own, or another one after another policy.
        """
        ids = [frame.label_ids(labels) for frame in self._plain().frames]
        if any(other != ids[0] for other in ids):
            raise GuardError(
                f"guardrail '{self._guard}': the labels {list(labels)} begin with other tokens from policy to policy; "
                f"end verdict_prefix with text that is the same for all of them"
            )
        return ids[0]

    def bos_problem(self) -> str | None:
        """What is wrong with the prompt's beginning, or None."""
        return next((problem for frame in self._plain().frames if (problem := frame.bos_problem())), None)

    def _plain(self) -> _Shape:
        try:
            return self._shape(("user", "assistant"))
        except UnrenderableError as error:
            raise GuardError(
                f"guardrail '{self._guard}': its chat template cannot show one user turn and its answer ({error}); "
                f"it is the template of another kind of model: name a model of this family"
            ) from error

    def _shape(self, roles: tuple[str, ...]) -> _Shape:
        if roles not in self._shapes:
            if len(self._shapes) >= _KEPT:
                self._shapes.clear()
            try:
                self._shapes[roles] = self._analysed(roles)
            except UnrenderableError as error:
                self._shapes[roles] = error
        shape = self._shapes[roles]
        if isinstance(shape, UnrenderableError):
            raise shape
        return shape

    def _analysed(self, roles: tuple[str, ...]) -> _Shape:
        frames, places, no_empty = [], [], None
        for settings in self._settings:
            probe = _Probe(self._tokenizer, roles, settings, self._generation_prompt, self._after)
            pieces = [*probe.pieces[:-1], probe.pieces[-1] + self._prefix]
            frames.append(Frame(self._tokenizer, [self._beginning(pieces[0]), *pieces[1:]], self._guard))
            places.append(probe.places())
            no_empty = no_empty or probe.no_empty_response()
        return _Shape(tuple(frames), tuple(places), no_empty)

    def _beginning(self, text: str) -> str:
        bos = self._tokenizer.bos_token
        if bos is None or not adds_bos(self._tokenizer):
            return text
        return text.lstrip() if text.lstrip().startswith(bos) else bos + text


def dialogue(messages: Sequence[Message]) -> list[Message]:
    """The user's and the assistant's turns; a system turn is no part of what these guards judge.

    Raises:
        UnrenderableError: another role, or a last turn that the response would not answer.
    """
    shown = [message for message in messages if message["role"] != "system"]
    if strange := [message["role"] for message in shown if message["role"] not in ("user", "assistant")]:
        raise UnrenderableError(f"the guard knows user and assistant turns only, and there is a turn of '{strange[0]}'")
    if not shown or shown[-1]["role"] != "user":
        raise UnrenderableError("the guard judges the answer to a user's turn, and the last turn is none")
    return shown


def alternating(messages: Sequence[Message]) -> list[Message]:
    """The dialogue, for a guard that reads the role of a turn off its number.

    Raises:
        UnrenderableError: as `dialogue`, or turns that do not alternate from a user's on.
    """
    shown = dialogue(messages)
    if any(message["role"] != ("user", "assistant")[number % 2] for number, message in enumerate(shown)):
        raise UnrenderableError("the guard takes every second turn for the user's, and these turns do not alternate")
    return shown


def last_turn(messages: Sequence[Message]) -> list[Message]:
    """The user's last turn alone, for a guard that judges one question and its answer.

    Raises:
        UnrenderableError: as `dialogue`.
    """
    return dialogue(messages)[-1:]


class _Probe:
    """What a template does with contents, found by rendering sentinels for conversations of given roles."""

    def __init__(
        self,
        tokenizer: Any,
        roles: tuple[str, ...],
        settings: Mapping[str, Any],
        generation_prompt: bool,
        after: tuple[Message, ...],
    ) -> None:
        self._tokenizer, self._roles, self._settings = tokenizer, roles, settings
        self._generation_prompt, self._after = generation_prompt, after
        self._sentinels = [f"ballastplace{number:06d}z" for number in range(len(roles))]
        self._typed = False
        self.pieces, self._order = self._split()

    def places(self) -> tuple[_Place, ...]:
        """(F,) whose content stands where, and what is stripped off its edges."""
        dropped_left: list[str] = [""] * len(self._order)
        dropped_right = dropped_left.copy()
        for space in " \n":
            left, order = self._parted(self._rendered([space + s for s in self._sentinels]))
            right, order_right = self._parted(self._rendered([s + space for s in self._sentinels]))
            if not order == order_right == self._order:
                raise UnrenderableError("the chat template moves a message when white space is added to it")
            for place in range(len(self._order)):
                dropped_left[place] += space if left[place] == self.pieces[place] else ""
                dropped_right[place] += space if right[place + 1] == self.pieces[place + 1] else ""
        # Both characters gone means a plain strip(), which takes every white space.
        return tuple(
            _Place(message, None if a == " \n" else a, None if b == " \n" else b)
            for message, a, b in zip(self._order, dropped_left, dropped_right, strict=True)
        )

    def no_empty_response(self) -> str | None:
        """Why an empty response cannot be shown, or None: a template may refuse it, or leave out its turn."""
        kept = _SENTINEL.sub("", self._rendered(self._sentinels))
        others = self._sentinels[:-1]
        try:
            empty = self._rendered([*others, ""])
        except UnrenderableError as error:
            return f"the response is empty here, and {error}"
        if _SENTINEL.sub("", empty) != kept:
            return "the response is empty here, and the chat template shows no empty turn"
        return None

    def _split(self) -> tuple[list[str], list[int]]:
        """The template's own text around the contents, and which message's content stands in each place."""
        first: UnrenderableError | None = None
        for self._typed in (False, True):
            try:
                pieces, order = self._parted(self._rendered(self._sentinels))
                if lost := [number for number in range(len(self._roles)) if number not in order]:
                    raise UnrenderableError(
                        f"the chat template does not show message {lost[0]} (role '{self._roles[lost[0]]}')"
                    )
                return pieces, order
            except UnrenderableError as error:
                first = first or error
        assert first is not None
        raise first

    def _parted(self, text: str) -> tuple[list[str], list[int]]:
        parts = _SENTINEL.split(text)
        return parts[::2], [int(number) for number in parts[1::2]]

    def _rendered(self, contents: Sequence[str]) -> str:
        from jinja2 import TemplateError

        turns = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._typed else text}
            for role, text in zip(self._roles, contents, strict=True)
        ]
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                [*turns, *self._after],
                tokenize=False,
                add_generation_prompt=self._generation_prompt,
                **_FIXED_DATE,
                **self._settings,
            )
        # A TypeError is what a template raises that adds a text to typed parts.
        except (TemplateError, TypeError) as error:
            raise UnrenderableError(f"the chat template refuses these messages ({error})") from error
        return rendered
