"""The section `probing`: safety-aware probing (SAP) of SFT and GRPO."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ballast.pipeline.config_base import Component, Names


class ProbingConfig(Component):
    """Safety-aware probing (arXiv 2505.16737): steps that stay useful under a push in the harmful direction.

    A vector is added to the hidden states of middle layers, along which a harmful change of the weights would help the
    task least, and the weights learn with it in place. It is no part of the saved model.
    """

    enabled: bool = Field(False, description="false trains without it")
    probe: Literal["fresh", "stale"] = Field(
        "fresh",
        description="fresh: the vector belongs to the very batch, three more passes a step; stale: it comes from the step "
        "before, two more",
    )
    layers: tuple[int, int] | None = Field(
        None, description="first and last probed layer, counted from 0; None takes 11/32 to 20/32 of the depth"
    )
    beta: PositiveFloat = Field(0.05, description="size of the vector; what it is the size of, `scale` says")
    scale: Literal["rms", "gradient"] = Field(
        "rms",
        description="rms: beta is the root mean square of the vector's entries; gradient: the vector is beta times the "
        "gradient, as the paper writes it, which is next to nothing at the paper's step",
    )
    step: PositiveFloat | None = Field(
        None,
        description="length of the harmful step, as a share of the norm of the trained weights; None takes the paper's 2e-5 in "
        "float32 and 3e-2 in bfloat16, where a shorter one drowns in rounding: docs/probing.md",
    )
    temperature: PositiveFloat = Field(1.0, description="temperature of the contrast of refusal and compliance")
    data: Names = Field(("shipped:harmful",), min_length=1, description="sources of harmful prompts with refusals")
    rejected_column: str | None = Field(
        None, description="column with the harmful answer; None takes `compliance` for all rows"
    )
    compliance: str = Field(
        "Sure, here is how to do that, step by step:",
        min_length=1,
        description="the beginning of a harmful answer, where the rows bring none",
    )
    batch_size: PositiveInt = Field(4, description="rows that the harmful direction of a step is taken from")
    max_length: PositiveInt = Field(256, description="tokens of prompt and answer; longer answers are cut")
    max_skipped: PositiveInt = Field(
        10, description="steps in a row whose harmful direction is not finite or 0, after which the run stops"
    )

    @model_validator(mode="after")
    def _layers_in_order(self) -> Self:
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError(
                f"probing.layers = {list(self.layers)} is no range: write [first, last], counted from 0, first not above last"
            )
        return self
