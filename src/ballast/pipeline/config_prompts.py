"""The section `prompts`: which system prompts are measured, on which model, and what the chosen one may cost."""

from typing import Annotated, Literal

from pydantic import Field

from ballast.pipeline.config_base import Component, Names

CandidateName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=24)]
CandidateText = Annotated[str, Field(min_length=1, pattern=r"\S")]


class PromptsConfig(Component):
    """System prompts to choose from: docs/system-prompts.md."""

    model: Literal["start", "tuned"] = Field(
        "start",
        description="start: the model before the run, for a prompt to train and to serve with; tuned: the trained model, for "
        "one to serve with alone (prompting.policy ptst)",
    )
    suite: Names | None = Field(
        None, min_length=1, description="sources of the prompts that are measured on; None takes data.test"
    )
    shipped: bool = Field(True, description="measure the shipped system prompts too")
    candidates: dict[CandidateName, CandidateText] = Field(
        {}, description="system prompts of your own, by a name in small letters, digits, - and _"
    )
    max_refused_ordinary: float = Field(
        0.1, ge=0, le=1, description="share of ordinary prompts that a model may refuse under the chosen system prompt"
    )
    max_incoherent: float = Field(
        0.05,
        ge=0,
        le=1,
        description="fall of the share of coherent answers that is allowed, below that under the first candidate",
    )
