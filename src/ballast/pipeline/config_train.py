"""GRPO in a run's configuration."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from ballast.pipeline.config_base import Component, LoraConfig, Names
from ballast.pipeline.config_inputs import SamplingConfig
from ballast.pipeline.config_shaping import refuse_wrong_options


class TrainConfig(Component):
    """GRPO by TRL with shaped advantages and a LoRA.

    Where `method` is sft, the section `sft` takes its place, and of this one only `max_unscored_share`, `report_to` and
    `checkpoint_every` count.
    """

    method: Literal["grpo", "sft"] = Field(
        "grpo", description="grpo learns from its own completions, sft imitates answers as the section sft says"
    )
    steps: PositiveInt = Field(30, description="optimizer steps")
    prompts_per_step: PositiveInt = Field(4, description="different prompts in a step")
    group_size: int = Field(8, ge=2, description="completions of each prompt; the group is the baseline")
    micro_batch_size: PositiveInt = Field(16, description="completions per forward and backward pass")
    learning_rate: PositiveFloat = Field(1e-4, description="peak learning rate")
    warmup_steps: int = Field(2, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="the learning rate after the warm-up: constant, or falling to 0 at the last step"
    )
    max_grad_norm: PositiveFloat = Field(1.0, description="gradient norm above which gradients are scaled down")
    beta: NonNegativeFloat = Field(0.0, description="KL to the reference in TRL's loss; 0 computes no reference")
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"] = Field(
        "dapo", description="TRL's policy loss; vespo and luspo are wrong with per-token advantages"
    )
    importance_sampling: bool = Field(
        True,
        description="correct for the difference between vLLM's log-probs and the trainer's, token by token; costs a forward",
    )
    sampling: SamplingConfig = SamplingConfig()
    lora: LoraConfig = LoraConfig()
    max_unscored_share: float = Field(
        0.25, ge=0, le=1, description="share of unscored completions in a step that stops the run"
    )
    checkpoint_every: PositiveInt | None = Field(
        None,
        description="optimizer steps between checkpoints, from the last of which `--resume` goes on after a kill; null makes "
        "none, and the stage then begins again",
    )
    reward_functions: Names = Field((), description="further rewards as `package.module:function`, weight 1 each")
    report_to: Names = Field((), description="passed on to TRL: wandb, tensorboard, ...; none by default")

    @model_validator(mode="before")
    @classmethod
    def _follows_tokens(cls, data: Any) -> Any:
        refuse_wrong_options("train", data if isinstance(data, dict) else {})
        return data

    @model_validator(mode="after")
    def _groups_differ(self) -> Self:
        if self.sampling.temperature == 0:
            raise ValueError(
                "train.sampling.temperature = 0 makes all completions of a group alike, so that none is better than "
                "another; set it above 0, usually to 1.0"
            )
        return self

    @model_validator(mode="after")
    def _batch_splits_evenly(self) -> Self:
        rows = self.prompts_per_step * self.group_size
        if rows % min(self.micro_batch_size, rows):
            raise ValueError(
                f"train.micro_batch_size = {self.micro_batch_size} does not divide prompts_per_step * group_size = {rows}; "
                f"choose a divisor of {rows}"
            )
        return self
