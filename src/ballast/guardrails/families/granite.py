"""Granite Guardian 3.x and 4.1 (IBM): does the answer meet a criterion, such as harm, yes or no.

Read from the model cards and published users of granite-guardian-3.0 to 3.3 and 4.1-8b. Three forms:

    version     the criterion stands in                             the guard writes before its verdict
    3.0 (-3.2)  the template's `guardian_config`, as `risk_name`    nothing
    3.3         the template's `guardian_config`, as `criteria_id`  an empty thought, then `<score>`
    4.1         a last user turn, `instruction` of the options      an empty thought, then `<score>`

Only the last question and its answer are shown: 3.0 reads a third message as a tool's. Reasoning first
(think mode) needs decoding and is not offered.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ballast.errors import GuardError
from ballast.guardrails.families.chat import ChatRenderer, last_turn
from ballast.guardrails.families.frame import Renderer
from ballast.guardrails.families.verdict import VerdictGuard, VerdictOptions

_NO_THOUGHT = "<think>\n</think>\n<score>"
_PREFIXES: Mapping[str, str] = {"3.0": "", "3.3": _NO_THOUGHT, "4.1": _NO_THOUGHT}

# The key of `guardian_config` under which a version's template reads the criterion.
_KEYS: Mapping[str, str] = {"3.0": "risk_name", "3.3": "criteria_id"}


class GraniteGuardianOptions(VerdictOptions):
    """Options of Granite Guardian."""

    type: Literal["granite_guardian"] = "granite_guardian"
    model: str = Field(
        default="ibm-granite/granite-guardian-3.3-8b", description="a hub id or a local folder of Granite Guardian"
    )
    version: Literal["3.0", "3.3", "4.1"] = Field(
        default="3.3", description="how the model is asked; `3.0` also stands for 3.1 and 3.2"
    )
    criterion: str = Field(
        default="harm",
        min_length=1,
        description="name of the risk in the template of 3.x; 4.1 reads `instruction` instead",
    )
    instruction: str | None = Field(
        default=None,
        min_length=1,
        description="4.1 only: the last user turn, which states the criterion and asks for a score without thinking, in the words of the model card",
    )
    verdict_prefix: str = Field(
        default=_NO_THOUGHT, description="text of the guard's turn before its verdict; left out, that of the version"
    )

    @model_validator(mode="before")
    @classmethod
    def _prefix_of_the_version(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "verdict_prefix" in given:
            return given
        prefix = _PREFIXES.get(str(given.get("version", "3.3")))
        return given if prefix is None else {**given, "verdict_prefix": prefix}

    @model_validator(mode="after")
    def _instruction_belongs_to_4_1(self) -> "GraniteGuardianOptions":
        if self.version == "4.1" and self.instruction is None:
            raise ValueError(
                "version 4.1 reads its criterion from the last user turn and instruction is not set; write the block "
                "`<guardian>...` of its model card (without thinking, with your criterion) into instruction"
            )
        if self.version != "4.1" and self.instruction is not None:
            raise ValueError(
                f"instruction is set, but version {self.version} reads its criterion from the chat template; "
                f"set criterion, or version to 4.1"
            )
        return self


class GraniteGuardian(VerdictGuard):
    """Granite Guardian 3.x or 4.1: does the answer meet a criterion, in the model's own chat template."""

    options: GraniteGuardianOptions

    def __init__(self, options: GraniteGuardianOptions) -> None:
        super().__init__(options)

    def renderer(self, tokenizer: Any) -> Renderer:
        """The chat template, given the criterion as the version takes it.

        Raises:
            GuardError: the template is that of another version.
        """
        options = self.options
        settings: dict[str, Any] = {}
        if options.version in _KEYS:
            key = _KEYS[options.version]
            settings = {"guardian_config": {key: options.criterion}, "think": False}
            if tokenizer.chat_template and key not in str(tokenizer.chat_template):
                raise GuardError(
                    f"guardrail '{self.name}': its chat template never reads '{key}', by which version {options.version} is told the criterion; "
                    f"set version to the one of the model"
                )
        return ChatRenderer(
            tokenizer,
            self.name,
            settings={None: settings},
            verdict_prefix=options.verdict_prefix,
            generation_prompt=True,
            turns=last_turn,
            after=[{"role": "user", "content": options.instruction}] if options.instruction else [],
        )

    def spellings(self) -> tuple[Sequence[str], Sequence[str]]:
        """`No` and `Yes` of 3.0; ` no` and ` yes` inside the score's tags since 3.3."""
        if self.options.version == "3.0":
            return ("No",), ("Yes",)
        return (" no", "no"), (" yes", "yes")
