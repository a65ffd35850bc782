"""Verdicts by prompt: what pairs two models, whose numbers of answers to a prompt may differ."""

from collections.abc import Sequence

from ballast.errors import DataError
from ballast.pipeline.evaluation.judges import Verdict
from ballast.pipeline.evaluation.suites import Kind


def kinds_of(verdicts: Sequence[Verdict]) -> dict[str, Kind]:
    """The kind of each prompt.

    Raises:
        DataError: a prompt has two kinds.
    """
    kinds: dict[str, Kind] = {}
    for v in verdicts:
        if kinds.setdefault(v.prompt_id, v.kind) != v.kind:
            raise DataError(f"prompt '{v.prompt_id}' has the kinds {kinds[v.prompt_id]} and {v.kind}; give it one")
    return kinds


def prompt_means(verdicts: Sequence[Verdict], field: str) -> dict[str, float | None]:
    """The mean of a field over each prompt's scored samples; None where none was scored."""
    values: dict[str, list[float]] = {}
    for v in verdicts:
        scored = values.setdefault(v.prompt_id, [])
        if (value := getattr(v, field)) is not None:
            scored.append(float(value))
    return {prompt: sum(scored) / len(scored) if scored else None for prompt, scored in values.items()}


def changed_verdicts(
    before: Sequence[Verdict], after: Sequence[Verdict], prompts: Sequence[str], field: str = "unsafe"
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The prompts that became unsafe and those that became safe, by the majority of their samples.

    Args:
        before: (N,) verdicts of the first model.
        after: (M,) verdicts of the second.
        prompts: ids of the prompts to look at, which both were asked.
        field: the verdict: `unsafe`, or `second_unsafe`.
    """
    share_before, share_after = prompt_means(before, field), prompt_means(after, field)
    worse, better = [], []
    for prompt in prompts:
        b, a = share_before[prompt], share_after[prompt]
        if a is None or b is None:
            continue
        if b <= 0.5 < a:
            worse.append(prompt)
        elif a <= 0.5 < b:
            better.append(prompt)
    return tuple(worse), tuple(better)
