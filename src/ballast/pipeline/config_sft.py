"""The section `sft`: what `train` does where `train.method` is sft.

The loss of a target token t in segment k is

    w_t * CE_t + kl_weight * (1 - s_k) * KL_t(pi || pi_ref)

with s_k = STAR of the segment and w_t the weight that the chosen loss gives (`training/sft_losses.py`).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from ballast.pipeline.config_base import Component, LoraConfig, Names


class FaithfulLoss(Component):
    """Dynamic Safety Shaping as published (arXiv 2505.17196, eq. 3): w = s, and k2 on the label token as KL."""

    type: Literal["faithful"] = "faithful"
    kl_weight: NonNegativeFloat = Field(0.5, description="lambda of the KL where the text is unsafe; 0 has none")
    cache_reference: bool = Field(
        True, description="compute the reference's log-probs once before training; false computes them at every step"
    )


class CorrectedLoss(Component):
    """The same with the exact KL over the vocabulary, a cleaned trace, and a floor that leaves benign text alone."""

    type: Literal["corrected"] = "corrected"
    kl_weight: NonNegativeFloat = Field(0.5, description="lambda of the KL where the text is unsafe; 0 has none")
    benign_floor: float = Field(
        0.9,
        gt=0,
        le=1,
        description="STAR at and above which a segment counts as wholly safe, so that ordinary text is learnt in full; 1 "
        "has none. Choose it on benign text: training.json counts the STAR of every kind",
    )
    clean_trace: bool = Field(
        True, description="debounce, then running minimum, so that a safe-sounding ending cannot undo harm"
    )
    chunk_tokens: PositiveInt = Field(
        128, description="tokens whose whole distribution is in memory at a time; more is hardly faster"
    )


class PlainLoss(Component):
    """Ordinary SFT: w = 1, no guard, no reference. A baseline."""

    type: Literal["plain"] = "plain"


class RejectLoss(Component):
    """Rejection sampling: one verdict of the whole response, w = 1 where it is safe and else 0. A baseline."""

    type: Literal["rs"] = "rs"
    threshold: float = Field(0.5, gt=0, lt=1, description="risk of the whole response at which it is left out")


class ConstrainedLoss(Component):
    """Constrained SFT (arXiv 2406.05946): w = 2 (1 - sigmoid(beta_t (log pi - log pi_ref))). A baseline.

    The first tokens of an answer are held near the reference; no guard is asked.
    """

    type: Literal["constrained"] = "constrained"
    beta_first: NonNegativeFloat = Field(0.5, description="beta of the first token of the answer")
    beta_early: NonNegativeFloat = Field(2.0, description="beta of the second to fifth token")
    beta_later: NonNegativeFloat = Field(0.1, description="beta of all later tokens; 0 is ordinary SFT")
    cache_reference: bool = Field(
        True, description="compute the reference's log-probs once before training; false computes them at every step"
    )


SFTLoss = Annotated[
    FaithfulLoss | CorrectedLoss | PlainLoss | RejectLoss | ConstrainedLoss, Field(discriminator="type")
]


class SFTConfig(Component):
    """SFT by TRL with weights a token from the guardrail, in a LoRA on the aligned model."""

    rows: Literal["data", "rollouts"] = Field(
        "data",
        description="what is imitated: the answers of sft.data, judged before training, or the completions that the stage "
        "score has judged",
    )
    data: Names = Field(("shipped",), min_length=1, description="sources of prompts with answers, for rows = data")
    max_rows: PositiveInt | None = Field(None, description="use at most this many rows, drawn by the seed")
    loss: SFTLoss = CorrectedLoss()
    epochs: PositiveFloat = Field(1.0, description="passes over the rows; a fraction is allowed")
    learning_rate: PositiveFloat = Field(1e-4, description="peak learning rate")
    warmup_steps: int = Field(2, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="the learning rate after the warm-up: constant, or falling to 0 at the last step"
    )
    max_grad_norm: PositiveFloat = Field(1.0, description="gradient norm above which gradients are scaled down")
    batch_size: PositiveInt = Field(8, description="rows per optimizer step")
    micro_batch_size: PositiveInt = Field(8, description="rows per forward and backward pass")
    max_length: PositiveInt = Field(512, description="tokens of prompt and answer; longer rows are cut")
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="before")
    @classmethod
    def _keeps_the_weights(cls, data: Any) -> Any:
        lost = [key for key in ("packing", "padding_free") if isinstance(data, dict) and data.get(key)]
        if lost:
            raise ValueError(
                f"sft.{lost[0]} = {data[lost[0]]!r} is refused: it joins rows and leaves the weight of every token behind; take the key "
                "out, and raise sft.micro_batch_size for speed"
            )
        return data

    @model_validator(mode="after")
    def _batch_splits_evenly(self) -> Self:
        if self.batch_size % min(self.micro_batch_size, self.batch_size):
            raise ValueError(
                f"sft.micro_batch_size = {self.micro_batch_size} does not divide sft.batch_size = {self.batch_size}; "
                f"choose a divisor of {self.batch_size}"
            )
        return self
