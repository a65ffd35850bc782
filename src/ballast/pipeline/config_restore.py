"""The section `restore`: which repairs of the tuned model are tried, and what a repair may cost."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from ballast.pipeline.config_base import Component, Names


def _each_once(values: tuple[float, ...]) -> tuple[float, ...]:
    # As they stand in the names of files.
    shown = [f"{value:g}" for value in values]
    twice = [text for text in shown if shown.count(text) > 1]
    if twice:
        raise ValueError(f"{twice[0]} comes twice; name each strength once, with at most six digits")
    return values


Strength = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Strengths = Annotated[tuple[Strength, ...], Field(min_length=1), AfterValidator(_each_once)]
Share = Annotated[float, Field(gt=0, le=1)]
Cosine = Annotated[float, Field(gt=-1, le=1)]
_LAYERS = ("*.[0-9]*.*",)


class LoxSweep(Component):
    """LoX: the leading directions of (aligned - base), added to the tuned model."""

    type: Literal["lox"] = "lox"
    rank: PositiveInt = Field(6, description="singular directions of each matrix")
    alpha: Strengths = Field((0.5, 1.0, 1.25), description="strengths to try")
    modules: Names = Field(_LAYERS, description="patterns of tensor names; the default is the matrices of all layers")


class SafeLoraSweep(Component):
    """Safe LoRA: what the tuning changed, projected onto the alignment where it leads away from it."""

    type: Literal["safe-lora"] = "safe-lora"
    tau: Annotated[tuple[Cosine, ...], Field(min_length=1), AfterValidator(_each_once)] = Field(
        (0.35,), description="cosines to try, below which a matrix is projected; 1 projects all"
    )
    modules: Names = Field(_LAYERS, description="patterns of tensor names; the default is the matrices of all layers")


class RestaSweep(Component):
    """RESTA, task arithmetic: (aligned - base), added to the tuned model."""

    type: Literal["resta"] = "resta"
    gamma: Strengths = Field((0.5, 1.0), description="strengths to try")
    modules: Names = Field(("*",), description="patterns of tensor names; the default is every tensor")


class NLSRSweep(Component):
    """NLSR: a super-aligned reference's values for the safety neurons of the layers that tuning turned most.

    It runs the aligned model on calibration rows: harmful prompts of `align.data` with their answers.
    """

    type: Literal["nlsr"] = "nlsr"
    share: Annotated[tuple[Share, ...], Field(min_length=1), AfterValidator(_each_once)] = Field(
        (0.5,), description="shares of the layers to try, the least similar first, that are patched"
    )
    beta: float = Field(0.9, ge=0, description="how far the reference lies beyond the aligned model; 0 takes that one")
    sparsity: float = Field(
        0.8, ge=0, lt=1, description="share of each matrix's entries that are left alone; 0 patches all of them"
    )
    rank: PositiveInt | None = Field(
        None,
        description="rank of the alignment; null takes align.lora.r for the run's own, else that of the whole matrix",
    )
    unit: Literal["module", "layer"] = Field(
        "module", description="what a layer is: a linear module, or a decoder layer"
    )
    max_rows: PositiveInt = Field(128, description="calibration rows, drawn by the run's seed")
    batch_size: PositiveInt = Field(8, description="calibration rows a forward pass")
    modules: Names = Field(_LAYERS, description="patterns of tensor names; the default is the matrices of all layers")


Sweep = Annotated[LoxSweep | SafeLoraSweep | RestaSweep | NLSRSweep, Field(discriminator="type")]


class RestoreConfig(Component):
    """Repairs of the tuned model that are tried and measured; the best within the limits is kept."""

    enabled: bool = Field(False, description="whether `ballast run` does it after evaluate")
    base: str | None = Field(
        None, description="model from before the alignment; None is the run's start model, which needs align.enabled"
    )
    aligned: str | None = Field(None, description="the safe model; None is the one that training started from")
    methods: tuple[Sweep, ...] = Field(
        (LoxSweep(), SafeLoraSweep(), RestaSweep()),
        min_length=1,
        description="what is tried, each with its strengths: lox, safe-lora, resta, nlsr",
    )
    keep_gain: float = Field(
        0.9, ge=0, le=1, description="share of what training gained on each task reward that must be kept"
    )
    max_over_refusal: float = Field(
        0.05,
        ge=0,
        le=1,
        description="rise of the refusals on scary and on ordinary prompts that is allowed, over the tuned model",
    )
    max_incoherent: float = Field(
        0.05, ge=0, le=1, description="fall of the share of coherent answers that is allowed, below the tuned model"
    )
    device: str = Field("cpu", description="where the weights are computed: cpu, cuda")

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if self.base is None and self.aligned is not None:
            raise ValueError(
                "restore.aligned without restore.base: the alignment is the difference of the two, and the start model may be "
                "neither; give the model from before the alignment as restore.base"
            )
        return self

    @property
    def nlsr(self) -> tuple[NLSRSweep, ...]:
        """The sweeps that need calibration rows."""
        return tuple(sweep for sweep in self.methods if isinstance(sweep, NLSRSweep))
