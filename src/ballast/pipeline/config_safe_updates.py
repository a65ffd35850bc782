"""The section `safegrad`: every update of `train` is kept from pushing against safety (`docs/safegrad.md`)."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ballast.pipeline.config_base import Component, Names

# Which keys act in which mode alone; elsewhere they would be read by nothing.
_OWN = {
    "project": ("rho", "projection", "metric", "noise_floor", "log_layers"),
    "trust_region": ("margin", "max_step"),
    "watchdog": ("tolerance", "budget", "halvings"),
}


class SafeGradConfig(Component):
    """SafeGrad in the stage `train`, for GRPO and SFT alike. Its reference is the model that training starts from."""

    enabled: bool = Field(False, description="false trains without it")
    data: Names = Field(
        ("shipped:harmful",),
        min_length=1,
        description="sources of prompts with the answers to keep, above all refusals",
    )
    max_rows: PositiveInt | None = Field(
        16, description="use at most this many rows, drawn by the seed; 10 to 20 are enough for the KL"
    )
    max_length: PositiveInt = Field(512, description="tokens of prompt and answer; longer answers are cut")
    batch_size: PositiveInt = Field(8, description="rows of a safety gradient")
    every_n_steps: PositiveInt = Field(
        1,
        description="optimizer steps between safety gradients, of which the last is used again meanwhile; or between checks",
    )
    mode: Literal["project", "trust_region", "watchdog"] = Field(
        "project",
        description="project the gradient; step back after an update that left safety; or shorten and undo updates that "
        "raised the safety loss",
    )
    objective: Literal["kl", "ce"] | None = Field(
        None,
        description="safety loss: KL to the start model or cross-entropy of the answers; None: ce for trust_region, else kl",
    )
    rho: NonNegativeFloat = Field(1.0, description="project: weight of the safety gradient; 0 projects only")
    projection: Literal["global", "none"] = Field("global", description="project: none only adds the safety gradient")
    metric: Literal["euclidean", "adam"] = Field(
        "euclidean", description="project: adam projects what the optimizer makes of the gradient"
    )
    noise_floor: NonNegativeFloat = Field(
        1e-8,
        description="project: squared norm of the safety gradient, as a share of the task's, below which it is rounding",
    )
    log_layers: bool = Field(False, description="project: log the cosine of both gradients in every layer")
    margin: NonNegativeFloat = Field(
        0.0, description="trust_region: nats a token above the start model's loss left alone"
    )
    max_step: PositiveFloat | None = Field(
        None, description="trust_region: longest step back; None takes the learning rate"
    )
    tolerance: NonNegativeFloat = Field(
        0.01, description="watchdog: rise of the safety loss that one update may bring, in nats a token"
    )
    budget: NonNegativeFloat | None = Field(None, description="watchdog: rise since the start; None has no limit")
    halvings: NonNegativeInt = Field(3, description="watchdog: how often an update is halved before it is undone")
    max_skipped: NonNegativeInt = Field(
        5, description="updates that may be skipped because the safety loss was no number; one more stops the run"
    )

    @model_validator(mode="after")
    def _keys_belong_to_the_mode(self) -> Self:
        for mode, keys in _OWN.items():
            for key in keys:
                value = getattr(self, key)
                if mode != self.mode and value != type(self).model_fields[key].default:
                    raise ValueError(
                        f"safegrad.{key} = {value} acts in mode {mode} alone, and safegrad.mode is {self.mode}; take the key out, or "
                        f"set safegrad.mode to {mode}"
                    )
        return self

    @model_validator(mode="after")
    def _something_happens(self) -> Self:
        if self.mode == "project" and self.rho == 0 and self.projection == "none":
            raise ValueError(
                "safegrad.rho = 0 with safegrad.projection = none changes no update; set one of them, or safegrad.enabled to false"
            )
        return self
