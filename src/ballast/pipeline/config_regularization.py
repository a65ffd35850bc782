"""The section `regularization`: what keeps the trained weights near where they began."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, model_validator

from ballast.pipeline.config_base import Component, Names


class RegularizationConfig(Component):
    """Plain means against drift; each is off at its default."""

    kl_weight: NonNegativeFloat = Field(
        0.0,
        description="KL(policy || start model) added to the loss of SFT, in nats a token; GRPO has train.beta; 0 is off",
    )
    kl_tokens: Literal["answer", "prompt", "all"] = Field(
        "answer",
        description="tokens whose KL is summed; the sum is divided by the answers' tokens whichever they are, so that prompt and "
        "all weigh more than answer at the same kl_weight",
    )
    l2_weight: NonNegativeFloat = Field(
        0.0,
        description="factor of half the squared distance of the weights from the start; of a LoRA it is the distance of "
        "the merged weights, not of A and B; 0 is off",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of the average of the trained weights, which is what is saved; it looks back about "
        "1 / (1 - decay) steps; None is off",
    )
    safety_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of safety rows among the rows of SFT, mixed in; 0 is off, SafeInstr took 0.03",
    )
    safety_data: Names = Field(("shipped:harmful",), min_length=1, description="sources of the safety rows")

    @model_validator(mode="after")
    def _seen(self) -> Self:
        if self.safety_share == 0 and self.safety_data != type(self).model_fields["safety_data"].default:
            raise ValueError(
                "regularization.safety_data is given and regularization.safety_share = 0, so no row of it would be used; set a share "
                "such as 0.03, or leave the data out"
            )
        return self


def check_method(settings: RegularizationConfig, method: str, rows: str) -> None:
    """What is asked for exists in this kind of training.

    Args:
        settings: the section.
        method: `grpo` or `sft`.
        rows: `sft.rows`.

    Raises:
        ValueError: it does not; the message says what to write instead.
    """
    if method == "grpo" and settings.kl_weight > 0:
        raise ValueError(
            f"regularization.kl_weight = {settings.kl_weight} belongs to SFT, and train.method is grpo, which has a KL of its own; set "
            "train.beta instead"
        )
    if settings.safety_share > 0 and (method == "grpo" or rows != "data"):
        where = "train.method is grpo" if method == "grpo" else f"sft.rows is {rows}"
        raise ValueError(
            f"regularization.safety_share = {settings.safety_share} mixes answers into those that SFT imitates, and {where}; take it "
            "out, or add harmful prompts to data.train"
        )
