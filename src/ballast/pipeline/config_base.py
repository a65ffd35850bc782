"""What every part of a run's configuration is built on, and what several parts share."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt


def _one_is_a_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


# A list of names, of which a single one may be written without brackets: `data.train=prompts.jsonl`.
Names = Annotated[tuple[str, ...], BeforeValidator(_one_is_a_list)]


class Component(BaseModel):
    """Base of every part of a configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraConfig(Component):
    """The adapter that is trained. Its reference is the model with the adapter switched off."""

    r: PositiveInt = Field(16, description="rank")
    alpha: PositiveInt = Field(32, description="scale: the update is alpha / r * B A")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="modules that get an adapter"
    )
