"""Asking any guard, such that one row on which it raises costs the other rows nothing."""

import logging
from collections.abc import Sequence

from ballast.errors import BallastError, GuardError
from ballast.guardrails.types import Exchange, Guardrail, RiskTrace

_log = logging.getLogger(__name__)


def ask(guard: Guardrail, exchanges: Sequence[Exchange], cuts: Sequence[Sequence[int]]) -> list[RiskTrace]:
    """Judge each response at each of its cuts, whatever the guard does.

    A guard that raises on the batch is asked again row by row. A row on which it raises alone is unscored; its
    reason is the exception's type and not its message, which may quote the text.

    Raises:
        GuardError: the guard broke its contract: it left out exchanges or changed the cuts.
        BallastError: whatever else of ours the guard raised, such as a `ModelError` of missing weights: it would
            fail on every row, and says what to do.
    """
    try:
        traces = guard.assess(exchanges, cuts)
    except BallastError:
        raise
    except Exception as error:
        if len(exchanges) == 1:
            return [RiskTrace.unscored(cuts[0], f"the guard raised {type(error).__name__}")]
        _log.warning(
            "guardrail '%s' raised %s on a batch of %d; asking row by row",
            guard.name,
            type(error).__name__,
            len(exchanges),
        )
        return [ask(guard, [one], [row])[0] for one, row in zip(exchanges, cuts, strict=True)]
    if [tuple(trace.cuts) for trace in traces] != [tuple(row) for row in cuts]:
        raise GuardError(
            f"guardrail '{guard.name}' answered {len(traces)} traces for {len(exchanges)} exchanges, or changed their cuts; "
            f"run `ballast guard check {guard.name}` and mend its assess()"
        )
    return traces
