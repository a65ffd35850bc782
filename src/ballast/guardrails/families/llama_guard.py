"""Llama Guard 3 and 4 (Meta): the last turn of a dialogue is safe or unsafe, by a list of hazards in the prompt.

Read from the model cards of Llama-Guard-3-8B, -3-1B and -4-12B. The template names roles by the number of a
turn, so system turns are left out and turns must alternate. It ends before the two newlines that the model
writes ahead of its verdict, and strips each message, so white space at the end of a prefix changes nothing.
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from ballast.guardrails.families.chat import ChatRenderer, alternating
from ballast.guardrails.families.frame import Renderer
from ballast.guardrails.families.verdict import VerdictGuard, VerdictOptions


class LlamaGuardOptions(VerdictOptions):
    """Options of Llama Guard 3 or 4."""

    type: Literal["llama_guard"] = "llama_guard"
    model: str = Field(
        default="meta-llama/Llama-Guard-3-1B", description="a hub id or a local folder of Llama Guard 3 or 4"
    )
    verdict_prefix: str = Field(default="\n\n", description="text of the guard's turn before its verdict")


class LlamaGuard(VerdictGuard):
    """Llama Guard 3 or 4: safe or unsafe, in the model's own chat template."""

    def __init__(self, options: LlamaGuardOptions) -> None:
        super().__init__(options)

    def renderer(self, tokenizer: Any) -> Renderer:
        """The chat template; contents are typed parts where it shows only those (3-1B, 4-12B)."""
        return ChatRenderer(
            tokenizer,
            self.name,
            settings={None: {}},
            verdict_prefix=self.options.verdict_prefix,
            generation_prompt=True,
            turns=alternating,
        )

    def spellings(self) -> tuple[Sequence[str], Sequence[str]]:
        """`safe`; `unsafe`, which a list of hazards follows on the next line."""
        return ("safe",), ("unsafe",)
