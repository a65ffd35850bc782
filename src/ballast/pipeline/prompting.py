"""One prompt format from training to serving: chat template, system prompt, special tokens, and their fingerprint.

What a user or a model wrote may hold the text of a special token (`<|im_end|>`). Only the template's own
special tokens become such tokens here; in the text they stay text. Otherwise a policy could learn to end
its guard's or its own turn with words.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from ballast.errors import DataError, ModelError, UserError
from ballast.guardrails.types import Message

# Fixed conversations whose token ids identify a format; special tokens inside the text are part of the test.
_PROBES: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "Hello"},),
    ({"role": "user", "content": "  Two\nlines, 3 words: café 漢字 🙂 "},),
    (
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ),
    ({"role": "user", "content": "Text with <|im_end|>, </s> and <|endoftext|> in it"},),
)


class PromptFormat:
    """Turns conversations into the token ids that the policy sees.

    Args:
        tokenizer: the policy's tokenizer, with a chat template.
        system_prompt: a system message put before every conversation that has none; None leaves it to the
            template's own default.

    Raises:
        ModelError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of '{tokenizer.name_or_path}' has no chat template, so a conversation has no form; use a "
                "chat model, or save a chat_template.jinja beside its tokenizer"
            )
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self._special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special_pattern = re.compile("|".join(sorted(self._special, key=len, reverse=True)) or r"(?!)")

    def messages(self, prompt: str) -> list[Message]:
        """The conversation for a single request."""
        return self._with_system([{"role": "user", "content": prompt}])

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant begins to write.

        Raises:
            DataError: the text holds a special token's name, and this template rewrites its text in a way that
                hides which is which.
            ModelError: the template takes no such conversation, for example none with a system message.
        """
        turns = self._with_system(list(messages))
        rendered = self._render(turns)
        if not any(self._special_pattern.search(turn["content"]) for turn in turns):
            return self._ids(rendered, split_special_tokens=False)
        return self._encode_apart(turns, rendered)

    def encode_request(self, row_id: str, prompt: str) -> list[int]:
        """Token ids of a single request, with its row's name in what is refused.

        Raises:
            DataError: as in `encode`.
            ModelError: as in `encode`.
        """
        try:
            return self.encode(self.messages(prompt))
        except DataError as error:
            raise DataError(f"row {row_id}: {error}") from error

    def fingerprint(self) -> str:
        """sha256 over the token ids of fixed probe conversations, the stop token and the system prompt."""
        record = {
            "ids": [self._probe(probe) for probe in _PROBES],
            "eos": self.tokenizer.eos_token_id,
            "system_prompt": self.system_prompt,
        }
        return hashlib.sha256(json.dumps(record).encode()).hexdigest()

    def _probe(self, probe: Sequence[Message]) -> list[int] | str:
        # That a format refuses a conversation is a part of what it is.
        try:
            return self.encode(probe)
        except UserError as error:
            return type(error).__name__

    def _with_system(self, turns: list[Message]) -> list[Message]:
        if self.system_prompt is None or (turns and turns[0]["role"] == "system"):
            return turns
        return [{"role": "system", "content": self.system_prompt}, *turns]

    def _render(self, turns: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            system = "; leave prompting.system_prompt unset if it takes no system message" if self.system_prompt else ""
            raise ModelError(
                f"the chat template of '{self.tokenizer.name_or_path}' refuses a conversation with the roles "
                f"{', '.join(turn['role'] for turn in turns)} ({type(error).__name__}: {error}){system}"
            ) from error
        return text

    def _ids(self, text: str, split_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)[
            "input_ids"
        ]
        return ids

    def _encode_apart(self, turns: list[Message], rendered: str) -> list[int]:
        # Render once more with marks in place of the text: what is special between the marks is the template's.
        marks = [f"\ue000{i}\ue001" for i in range(len(turns))]
        marked = self._render(
            [{"role": turn["role"], "content": mark} for turn, mark in zip(turns, marks, strict=True)]
        )
        frame = re.split("(\ue000\\d+\ue001)", marked)
        for strip in (False, True):  # some templates trim the text
            texts = dict(zip(marks, (t["content"].strip() if strip else t["content"] for t in turns), strict=True))
            if "".join(texts.get(part, part) for part in frame) == rendered:
                return self._join(frame, texts)
        raise DataError(
            "a prompt holds the text of a special token, and the chat template rewrites its text, so the two cannot be "
            f"told apart; remove it from the prompt (its special tokens: {self.tokenizer.all_special_tokens})"
        )

    def _join(self, frame: Sequence[str], texts: dict[str, str]) -> list[int]:
        # Runs between the template's special tokens are encoded whole, as a tokenizer does after splitting there.
        ids: list[int] = []
        run = ""
        for part in frame:
            if part in texts:
                run += texts[part]
                continue
            end = 0
            for match in self._special_pattern.finditer(part):
                ids += self._ids(run + part[end : match.start()], split_special_tokens=True)
                ids.append(self.tokenizer.convert_tokens_to_ids(match.group()))
                run, end = "", match.end()
            run += part[end:]
        return ids + self._ids(run, split_special_tokens=True)
