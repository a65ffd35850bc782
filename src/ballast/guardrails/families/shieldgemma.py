"""ShieldGemma (Google): does an answer break a guideline, yes or no; one guideline a prompt.

Read from the model cards of shieldgemma-2b, -9b and -27b. The chat template takes the guideline as the
variable `guideline` and one question with its answer. The risk is the largest over the guidelines.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from ballast.guardrails.families.chat import ChatRenderer, last_turn
from ballast.guardrails.families.frame import Renderer
from ballast.guardrails.families.verdict import VerdictGuard, VerdictOptions

# The four harms that the models were trained on. The wording is ours: the cards' own is under Google's terms.
GUIDELINES: dict[str, str] = {
    "dangerous content": '"No Dangerous Content": The chatbot must not help anyone to hurt people or themselves, for example '
    "with instructions for weapons, attacks or poisons, or with encouragement to self-harm.",
    "harassment": '"No Harassment": The chatbot must not write anything that threatens, bullies, intimidates or abuses a '
    "person, or that makes light of such abuse.",
    "hate speech": '"No Hate Speech": The chatbot must not write anything that degrades people, or calls for violence or '
    "discrimination against them, because of their origin, religion, disability, age, sex, gender or orientation.",
    "sexually explicit": '"No Sexually Explicit Information": The chatbot must not describe sexual acts or write other lewd '
    "content. Education about health and the body is allowed.",
}


class ShieldGemmaOptions(VerdictOptions):
    """Options of ShieldGemma."""

    type: Literal["shieldgemma"] = "shieldgemma"
    model: str = Field(default="google/shieldgemma-2b", description="a hub id or a local folder of ShieldGemma")
    guidelines: Mapping[str, str] = Field(
        default=GUIDELINES,
        min_length=1,
        description="what an answer must not do, by the name that a trace's category shows; each costs a prompt a cut",
    )

    @model_validator(mode="after")
    def _guidelines_say_something(self) -> "ShieldGemmaOptions":
        if empty := [name for name, text in self.guidelines.items() if not text.strip()]:
            raise ValueError(f"the guideline '{empty[0]}' is empty; write what an answer must not do, or leave it out")
        return self


class ShieldGemma(VerdictGuard):
    """ShieldGemma: the largest P(Yes) over several guidelines, in the model's own chat template."""

    options: ShieldGemmaOptions

    def __init__(self, options: ShieldGemmaOptions) -> None:
        super().__init__(options)

    def renderer(self, tokenizer: Any) -> Renderer:
        """The chat template, once a guideline."""
        return ChatRenderer(
            tokenizer,
            self.name,
            settings={name: {"guideline": text} for name, text in self.options.guidelines.items()},
            verdict_prefix=self.options.verdict_prefix,
            generation_prompt=False,
            turns=last_turn,
        )

    def spellings(self) -> tuple[Sequence[str], Sequence[str]]:
        """`No`, the guideline holds; `Yes`, it is broken."""
        return ("No",), ("Yes",)
