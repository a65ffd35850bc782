"""When too little could be scored, the numbers mean nothing: stop and say why."""

from ballast.errors import GuardError


def stop_above_limit(unscored: int, total: int, limit: float, guard: str, reason: str | None, where: str) -> None:
    """Stop where a guard left more unscored than a run allows.

    Args:
        unscored: number of completions that the guard could not judge.
        total: number of completions that it was asked about; with 0 there is nothing to stop for.
        limit: largest allowed share, in [0, 1]; exactly this share still passes.
        guard: the guard's name.
        reason: why the first of them is unscored, where that is known.
        where: what was scored, as it reads after "unscored": "at step 3", "in the test set".

    Raises:
        GuardError: the share is above the limit.
    """
    if total == 0 or unscored / total <= limit:
        return
    raise GuardError(
        f"guardrail '{guard}' left {unscored} of {total} completions ({unscored / total:.0%}) unscored {where}, above "
        f"train.max_unscored_share = {limit:.0%}; first reason: {reason or 'not known here'}. "
        "Mend the guard and run again with --resume, or raise the limit"
    )
