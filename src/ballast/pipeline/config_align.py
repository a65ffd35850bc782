"""The warm start in a run's configuration."""

from pydantic import Field, PositiveFloat, PositiveInt

from ballast.pipeline.config_base import Component, LoraConfig, Names
from ballast.pipeline.config_inputs import SamplingConfig


class AlignConfig(Component):
    """A warm start before GRPO: LoRA SFT on answers, merged into a model folder of its own.

    Every reference and every later adapter starts at that folder.
    """

    enabled: bool = Field(True, description="false goes straight to GRPO from the start model")
    data: Names = Field(("shipped",), min_length=1, description="sources of prompts with answers")
    epochs: PositiveFloat = Field(1.0, description="passes over the rows; a fraction is allowed")
    max_rows: PositiveInt | None = Field(None, description="use at most this many rows, drawn by the seed")
    harmful_share: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="at most this share of the rows are harmful prompts, drawn by the seed, so that declining does not "
        "become a habit; null keeps them all",
    )
    rehearse: bool = Field(
        False,
        description="on prompts that are not harmful, imitate what the start model itself answers instead of the answer "
        "in the data, so that refusals change and little else; a refusal of its own is never imitated",
    )
    sampling: SamplingConfig = Field(
        SamplingConfig(),
        description="how the answers to rehearse are sampled; with fewer tokens than a refusal takes to show, none is "
        "recognised as one",
    )
    learning_rate: PositiveFloat = Field(2e-4, description="peak learning rate, linear decay")
    batch_size: PositiveInt = Field(8, description="rows per optimizer step")
    max_length: PositiveInt = Field(256, description="tokens of prompt and answer; longer rows are cut")
    opening_tokens: PositiveInt | None = Field(
        None,
        description="imitate at most this many tokens of an answer, from its start: where it declines or does not; "
        "null imitates all of it",
    )
    lora: LoraConfig = LoraConfig()
