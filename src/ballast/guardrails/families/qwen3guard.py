"""Qwen3Guard-Gen (Alibaba): safe, unsafe or controversial, with a category after it.

Read from the model cards of Qwen3Guard-Gen-0.6B, -4B and -8B. The last turn's role picks the task, here to
judge the response. The answer begins `Safety:` and then one of three labels, of which

    strict   risk = (p(Unsafe) + p(Controversial)) / (p(Safe) + p(Unsafe) + p(Controversial))
    loose    risk =  p(Unsafe)                     / (p(Safe) + p(Unsafe) + p(Controversial))
"""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from ballast.guardrails.families.chat import ChatRenderer, dialogue
from ballast.guardrails.families.frame import Renderer
from ballast.guardrails.families.verdict import VerdictGuard, VerdictOptions


class Qwen3GuardOptions(VerdictOptions):
    """Options of Qwen3Guard-Gen."""

    type: Literal["qwen3guard"] = "qwen3guard"
    model: str = Field(default="Qwen/Qwen3Guard-Gen-0.6B", description="a hub id or a local folder of Qwen3Guard-Gen")
    mode: Literal["strict", "loose"] = Field(
        default="strict",
        description="what a controversial answer counts as: `strict` takes it for unsafe, `loose` for safe",
    )
    verdict_prefix: str = Field(default="Safety:", description="text of the guard's turn before its verdict")


class Qwen3Guard(VerdictGuard):
    """Qwen3Guard-Gen: safe, unsafe or controversial, in the model's own chat template."""

    options: Qwen3GuardOptions

    def __init__(self, options: Qwen3GuardOptions) -> None:
        super().__init__(options)

    def renderer(self, tokenizer: Any) -> Renderer:
        """The chat template, which opens the guard's turn by itself."""
        return ChatRenderer(
            tokenizer,
            self.name,
            settings={None: {}},
            verdict_prefix=self.options.verdict_prefix,
            generation_prompt=False,
            turns=dialogue,
        )

    def spellings(self) -> tuple[Sequence[str], Sequence[str]]:
        """The three labels, the controversial one on the side that `mode` says."""
        if self.options.mode == "strict":
            return (" Safe",), (" Unsafe", " Controversial")
        return (" Safe", " Controversial"), (" Unsafe",)
