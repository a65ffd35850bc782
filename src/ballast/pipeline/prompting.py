"""One prompt format from training to serving: chat template, system prompt, special tokens, and their contract.

What a user or a model wrote may hold the text of a special token (`<|im_end|>`). Only the template's own
special tokens become such tokens here; in the text they stay text. Otherwise a policy could learn to end
its guard's or its own turn with words.
"""

import copy
import datetime
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ballast.errors import ConfigError, DataError, ModelError, UserError
from ballast.guardrails.types import Message
from ballast.pipeline.template_contract import Policy, TemplateContract

# Fixed conversations whose token ids identify a format; special tokens inside the text are part of the test.
_PROBES: dict[str, tuple[Message, ...]] = {
    "greeting": ({"role": "user", "content": "Hello"},),
    "unicode": ({"role": "user", "content": "  Two\nlines, 3 words: café 漢字 🙂 "},),
    "turns": (
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ),
    "own system": ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}),
    "special": ({"role": "user", "content": "Text with <|im_end|>, </s> and <|endoftext|> in it"},),
}
_PLAIN = "without system"  # the probe to which no system prompt is added
_OWN_SPECIAL = "own special"  # the tokenizer's own special tokens as text
_MOST_SPECIAL = 16  # of them, in that probe
_STAND_IN = "\ue002"  # no tokenizer's and no template's own
_CLOCK = datetime.datetime(2024, 7, 26)  # for templates that write today's date, whose probes must not change with it


class PromptFormat:
    """Turns conversations into the token ids that the policy sees.

    Args:
        tokenizer: the policy's tokenizer, with a chat template.
        system_prompt: a system message put before every conversation that has none; None leaves it to the
            template's own default.
        policy: `consistent` serves the same system prompt; `ptst` serves another one (see `template_contract`).
        serving_system_prompt: that other one.

    Raises:
        ConfigError: the policy and the serving system prompt do not go together.
        ModelError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str | None = None,
        policy: Policy = "consistent",
        serving_system_prompt: str | None = None,
    ) -> None:
        check_policy(policy, system_prompt, serving_system_prompt)
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of '{tokenizer.name_or_path}' has no chat template, so a conversation has no form; use a "
                "chat model, or save a chat_template.jinja beside its tokenizer"
            )
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.policy = policy
        self.serving_system_prompt = system_prompt if policy == "consistent" else serving_system_prompt
        self._clock: datetime.datetime | None = None
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
        return self.encode_exactly(self._with_system(list(messages)))

    def encode_exactly(self, turns: list[Message]) -> list[int]:
        """As `encode`, with no system prompt added."""
        rendered = self._render(turns)
        if not any(self.holds_special(turn["content"]) for turn in turns):
            return self._ids(rendered, split_special_tokens=False)
        return self._encode_apart(turns, rendered)

    def encode_naively(self, turns: Sequence[Message]) -> list[int]:
        """As model servers do: no system prompt is added, and the text of a special token becomes one."""
        return self._ids(self._render(turns), split_special_tokens=False)

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

    def serving(self) -> "PromptFormat":
        """The format in which the model is served, and so measured: this one, with what is served as system prompt."""
        return PromptFormat(self.tokenizer, self.serving_system_prompt)

    def holds_special(self, text: str) -> bool:
        """Whether a text spells one of the tokenizer's special tokens."""
        return self._special_pattern.search(text) is not None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def probes(self) -> dict[str, list[Message]]:
        """The probe conversations, each with the system message that it is rendered with."""
        own = " ".join(
            sorted(t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special)[:_MOST_SPECIAL]
        )
        asked: dict[str, tuple[Message, ...]] = {
            **_PROBES,
            _OWN_SPECIAL: ({"role": "user", "content": f"Text with {own} in it"},),
        }
        turns = {name: self._with_system(list(probe)) for name, probe in asked.items()}
        return {**turns, _PLAIN: list(_PROBES["greeting"])}

    def contract(self) -> TemplateContract:
        """All that turns conversations into token ids, as data."""
        fixed = copy.copy(self)
        fixed._clock = _CLOCK
        served = self.serving()
        served._clock = _CLOCK
        return TemplateContract(
            chat_template=self.tokenizer.get_chat_template(),
            special_tokens={t.content: n for n, t in sorted(self.tokenizer.added_tokens_decoder.items()) if t.special},
            stop_tokens=self._stop_tokens,
            generation_prompt=fixed._generation_prompt(),
            default_system_prompt=fixed.default_system_prompt(),
            system_prompt=self.system_prompt,
            probes=fixed._probe_ids(),
            policy=self.policy,
            serving_system_prompt=self.serving_system_prompt,
            serving_probes=served._probe_ids(),
        )

    def fingerprint(self) -> str:
        """sha256 of the contract."""
        return self.contract().fingerprint()

    def _probe_ids(self) -> dict[str, list[int] | str]:
        return {name: self._probe(turns) for name, turns in self.probes().items()}

    def _probe(self, turns: list[Message]) -> list[int] | str:
        # That a format refuses a conversation is a part of what it is.
        try:
            return self.encode_exactly(turns)
        except UserError as error:
            return type(error).__name__

    @cached_property
    def _stop_tokens(self) -> dict[str, int]:
        ids = {self.tokenizer.eos_token_id}
        path = Path(self.tokenizer.name_or_path) / "generation_config.json"
        if self.tokenizer.name_or_path and path.is_file():  # generators end at these as well
            also = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            ids |= set(also) if isinstance(also, list) else {also}
        ids.discard(None)
        return {self.tokenizer.convert_ids_to_tokens(number): number for number in sorted(ids)}

    def _generation_prompt(self) -> str:
        turns = list(_PROBES["greeting"])
        try:
            whole, without = self._render(turns), self._render(turns, generation_prompt=False)
        except ModelError:
            return ""
        return whole.removeprefix(without) if whole.startswith(without) else whole

    def default_system_prompt(self) -> str | None:
        """What the template writes, at this moment, as the system where a conversation says nothing; see `TemplateContract`."""
        user = list(_PROBES["greeting"])
        try:
            given, default = self._render([{"role": "system", "content": _STAND_IN}, *user]), self._render(user)
        except ModelError:  # it takes no system message
            return None
        before, mark, after = given.partition(_STAND_IN)
        if not mark or not (default.startswith(before) and default.endswith(after)):
            return None
        text = default[len(before) : len(default) - len(after)]
        return text if len(default) >= len(before) + len(after) and text else None

    def _with_system(self, turns: list[Message]) -> list[Message]:
        if self.system_prompt is None or (turns and turns[0]["role"] == "system"):
            return turns
        return [{"role": "system", "content": self.system_prompt}, *turns]

    def _render(self, turns: Sequence[Message], generation_prompt: bool = True) -> str:
        from jinja2 import TemplateError

        # Goes before the function of that name that templates are given.
        clock = {} if self._clock is None else {"strftime_now": self._clock.strftime}
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=generation_prompt, **clock
            )
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


def check_policy(policy: Policy, system_prompt: str | None, serving_system_prompt: str | None) -> None:
    """The system prompts of training and serving go with the policy.

    Raises:
        ConfigError: they do not.
    """
    if policy == "consistent" and serving_system_prompt not in (None, system_prompt):
        raise ConfigError(
            "prompting.serving_system_prompt differs from prompting.system_prompt under prompting.policy = consistent, which serves "
            "what was trained with; leave it out, or set prompting.policy to ptst to serve another one on purpose"
        )
    if policy == "ptst" and serving_system_prompt in (None, system_prompt):
        why = "is not set" if serving_system_prompt is None else "is that of training"
        raise ConfigError(
            f"prompting.policy = ptst trains without the safety prompt and serves with it, and prompting.serving_system_prompt {why}; "
            "set it to the safety prompt and leave that out of prompting.system_prompt, or set prompting.policy to consistent"
        )
