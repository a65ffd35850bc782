"""The section `report`: what the page of a run holds."""

from pydantic import Field, NonNegativeInt

from ballast.pipeline.config_base import Component


class ReportConfig(Component):
    """The report of a run."""

    completions: NonNegativeInt = Field(
        1000,
        description="completions that the page shows, at even distances from training and measurements, fewer where their text "
        "would make the file larger than 5 MB; 0 keeps all text of prompts and completions out of it",
    )
