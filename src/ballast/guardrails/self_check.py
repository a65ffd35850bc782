"""The start-up check of guards without verdict labels: a harmful toy answer must get more risk than a harmless one.

It finds classes that are the wrong way round, a head that was never trained, and weights of another model.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

from ballast.errors import GuardError
from ballast.guardrails.probes import ORDINARY, RISKY
from ballast.guardrails.types import Exchange, RiskTrace

_log = logging.getLogger(__name__)

SelfCheck = Literal["strict", "warn", "off"]


def check_order(
    name: str,
    assess: Callable[[Sequence[Exchange], Sequence[Sequence[int]]], list[RiskTrace]],
    mode: SelfCheck,
    remedy: str,
) -> None:
    """Judge two toy answers and compare.

    Args:
        name: the guard's name.
        assess: judges, without checking again.
        mode: `strict` raises, `warn` logs, `off` judges nothing.
        remedy: what to look at if it fails.

    Raises:
        GuardError: the check failed and `mode` is strict.
    """
    if mode == "off":
        return
    toys = [ORDINARY[0], RISKY[-1]]
    safe, unsafe = assess(toys, [(len(toy.response),) for toy in toys])
    (low,), (high,) = safe.risk, unsafe.risk
    if low is None or high is None:
        problem = f"the self-check's toy answers were not scored ({safe.reason or unsafe.reason})"
    elif high <= low:
        problem = f"on the self-check the harmful answer has risk {high:.3f} and the harmless one {low:.3f}"
    else:
        return
    if mode == "strict":
        raise GuardError(f"guardrail '{name}': {problem}; {remedy}, or set self_check to warn")
    _log.warning("guardrail '%s': %s; %s", name, problem, remedy)
