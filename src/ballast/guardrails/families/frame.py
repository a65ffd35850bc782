"""The trusted frame around untrusted text, as token ids.

A frame is a prompt with two fields, `{conversation}` and `{response}`. The frame's own text is encoded once,
special tokens and all; what goes into the fields is encoded with `split_special_tokens`, where a special
token's name is plain text. Nothing is ever formatted into a string, so braces mean nothing anywhere.
"""

from collections.abc import Sequence
from typing import Any

from ballast.errors import GuardError
from ballast.guardrails.types import Message


class Frame:
    """A rendered prompt with room for a conversation and a response.

    Args:
        tokenizer: the guard's tokenizer (transformers).
        text: the whole prompt with `{conversation}` and `{response}` once each, ending right before the verdict.
        guard: the guard's name, for messages.

    Raises:
        GuardError: the chat template lost or doubled a field.
    """

    def __init__(self, tokenizer: Any, text: str, guard: str) -> None:
        before, conversation, rest = text.partition("{conversation}")
        between, response, after = rest.partition("{response}")
        if not conversation or not response or "{conversation}" in rest or "{response}" in after:
            raise GuardError(
                f"guardrail '{guard}': its chat template did not keep the fields of `template` once each; set use_chat_template to false"
            )
        self._tokenizer, self._guard, self._after_text = tokenizer, guard, after
        self._before, self._between, self._after = (self._trusted(part) for part in (before, between, after))

    def render(self, messages: Sequence[Message], response: str) -> list[int]:
        """Token ids of the prompt for one (partial) response.

        Raises:
            UnicodeEncodeError: the text holds a lone surrogate, which no tokenizer can read.
        """
        conversation = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        return [*self._before, *self._untrusted(conversation), *self._between, *self._untrusted(response), *self._after]

    def label_ids(self, labels: Sequence[str]) -> set[int]:
        """The token that each label begins with, in the place where the verdict stands.

        Raises:
            GuardError: a label is empty there, or melts into the end of the prompt.
        """
        ids = set()
        for label in labels:
            joined = self._trusted(self._after_text + label)
            if len(joined) <= len(self._after) or joined[: len(self._after)] != self._after:
                raise GuardError(
                    f"guardrail '{self._guard}': label {label!r} has no token of its own after the end of the prompt {self._after_text[-12:]!r}; "
                    f"move white space from the end of verdict_prefix to the start of the label"
                )
            ids.add(joined[len(self._after)])
        return ids

    def bos_problem(self) -> str | None:
        """What is wrong with the prompt's beginning, or None: a tokenizer's BOS must stand there exactly once."""
        bos = self._tokenizer.bos_token_id
        adds_one = bos is not None and self._tokenizer.encode("x")[:1] == [bos]
        leading = 0
        while bos is not None and self._before[leading : leading + 1] == [bos]:
            leading += 1
        if leading > 1:
            return f"the prompt begins with {leading} BOS tokens; remove the one that stands in template or in the chat template"
        if adds_one and leading == 0:
            return f"the prompt does not begin with BOS, which this tokenizer asks for; begin template with {self._tokenizer.bos_token!r}"
        return None

    def _trusted(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _untrusted(self, text: str) -> list[int]:
        text.encode("utf-8")  # raises on a lone surrogate, by a name that the caller can catch
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids
