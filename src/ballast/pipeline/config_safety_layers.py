"""The sections `localize` and `freeze`: where the safety layers are, and that they do not learn."""

import re
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ballast.pipeline.config_base import Component, Names

# Ranges as published (arXiv 2408.17003), first and last layer. Matched against the end of the model's name.
PRESETS: dict[str, tuple[int, int]] = {
    r"phi-3-mini(-\w+)*-instruct": (11, 15),
    r"llama-2-7b-chat(-hf)?": (6, 14),
    r"(meta-)?llama-3-8b-instruct": (6, 12),
    r"gemma-2b-it": (6, 11),
}
# Where nothing is known: layers 15 to 25 of 40.
FRACTION = (15 / 40, 25 / 40)


def preset_layers(model: str, layers: int) -> tuple[tuple[int, int], str]:
    """The published range of a model, else the fraction of the depth; and which of the two it is, in words.

    Args:
        model: its name or folder.
        layers: how many decoder layers it has.
    """
    name = model.rstrip("/").rsplit("/", 1)[-1].lower()
    for pattern, found in PRESETS.items():
        if re.fullmatch(pattern, name) and found[1] < layers:
            return found, f"published for {name} (arXiv 2408.17003)"
    first, last = (round(share * layers) for share in FRACTION)
    return (
        first,
        min(last, layers - 1),
    ), f"the fraction 15/40 to 25/40 of {layers} layers: nothing is known of this model"


class LocalizeConfig(Component):
    """Which layers tell harmful requests from harmless ones. Measured on the model that training starts from."""

    method: Literal["gap", "ablation", "scaling"] = Field(
        "gap",
        description="gap: where the representations of harmful and harmless prompts part; ablation: without which layers "
        "refusals fall; scaling: the borders at which louder layers refuse most scary but harmless prompts",
    )
    data: Names = Field(("shipped",), min_length=1, description="sources of harmful, scary and ordinary prompts")
    prompts: PositiveInt = Field(100, description="harmful prompts, and as many harmless ones, of each seed")
    seeds: PositiveInt = Field(3, description="draws of prompts; a band counts where all of them agree")
    tolerance: NonNegativeInt = Field(2, description="layers by which a border may differ between seeds")
    pairs: PositiveInt = Field(500, description="gap: random pairs of prompts whose angles are averaged")
    replicates: PositiveInt = Field(200, description="bootstrap draws behind the 95% band")
    max_new_tokens: PositiveInt = Field(12, description="ablation, scaling: tokens of an answer; enough to refuse in")
    batch_size: PositiveInt = Field(16, description="prompts per forward pass")
    max_language_loss: PositiveFloat = Field(
        1.0,
        description="ablation: nats a token by which the model's own plain answers may become less likely without a layer; "
        "above, the language is broken and the refusals say nothing",
    )
    alpha: float = Field(1.15, gt=1, description="scaling: factor of the layers' matrices")
    reach: PositiveInt = Field(3, description="scaling: layers by which each border may move")


class FreezeConfig(Component):
    """Safety layers that do not learn: no adapter there, no weight decay."""

    layers: tuple[NonNegativeInt, NonNegativeInt] | Literal["localized", "preset"] | None = Field(
        None,
        description="[first, last], counted from 0; localized: what the stage localize finds; preset: the published range of the "
        "model, or 15/40 to 25/40 of the depth; None freezes nothing",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if isinstance(self.layers, tuple) and self.layers[0] > self.layers[1]:
            raise ValueError(
                f"freeze.layers = {list(self.layers)} is no range: write [first, last] with first not above last"
            )
        return self
