"""What keeps the updates of a run safe, as its configuration asks for it."""

import sys
from typing import TYPE_CHECKING

from ballast.pipeline.data import Row
from ballast.pipeline.stages.align import encode_answer, rows_with_answers

if TYPE_CHECKING:
    from ballast.pipeline.config import RunConfig
    from ballast.pipeline.context import RunContext
    from ballast.pipeline.training.safegrad.callback import SafeGrad


def safe_update_data(config: "RunConfig") -> tuple[str, ...]:
    """The data sources of the safe updates that are on, as `section.key`."""
    on = {
        "safegrad.data": config.safegrad.enabled,
        "probing.data": config.probing.enabled,
        "regularization.safety_data": config.regularization.safety_share > 0,
    }
    return tuple(key for key, used in on.items() if used)


def safegrad_rows(config: "RunConfig") -> list[Row]:
    """The alignment rows, none of whose prompts is a test prompt.

    Raises:
        DataError: no source, no answer, or a prompt that is measured on too.
    """
    return rows_with_answers(config, config.safegrad.data, "safegrad.data", config.safegrad.max_rows)


def safegrad_callbacks(context: "RunContext") -> list["SafeGrad"]:
    """The callback that the section `safegrad` asks for; none where it is off. It goes before those that read the log.

    Raises:
        DataError: alignment rows that cannot be used.
    """
    from ballast.pipeline.training.safegrad.callback import SafeGrad

    settings = context.config.safegrad
    if not settings.enabled:
        return []
    # Rows are encoded by the run's own prompt format: the system prompt and the special tokens are those of training.
    rows = [encode_answer(context.prompt_format, row, sys.maxsize) for row in safegrad_rows(context.config)]
    options = settings.model_dump(exclude={"enabled", "data", "max_rows"})
    return [SafeGrad(rows, seed=context.config.seed, **options)]
