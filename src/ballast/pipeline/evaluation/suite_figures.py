"""The figures of each published set or file by itself, where a model was measured on several."""

from collections.abc import Sequence
from dataclasses import dataclass

from ballast.pipeline.evaluation.judges import Verdict
from ballast.pipeline.evaluation.statistics import Estimate, clustered_share


@dataclass(frozen=True)
class SuiteFigures:
    """How a model did on the prompts of one source. Every interval is clustered by prompt.

    Attributes:
        unsafe_share: share of its harmful prompts' answers that the judge finds unsafe (ASR).
        second_unsafe_share: the same by the second judge; None where there is none.
        refused_harmful: keyword refusals on its harmful prompts: wanted.
        refused_harmless: keyword refusals on its scary and ordinary prompts: over-refusal.
        coherent_share: share of all its answers that are readable English.
        prompts: its prompts.
    """

    unsafe_share: Estimate
    second_unsafe_share: Estimate | None
    refused_harmful: Estimate
    refused_harmless: Estimate
    coherent_share: Estimate
    prompts: int


def by_suite(verdicts: Sequence[Verdict], level: float, second: bool) -> dict[str, SuiteFigures]:
    """The figures of every source, by its name; empty where there is one source alone.

    Args:
        verdicts: (N,) of one model.
        level: coverage of the intervals.
        second: whether a second judge was asked.
    """
    names = list(dict.fromkeys(v.suite for v in verdicts))
    if len(names) < 2:
        return {}
    return {name: _figures([v for v in verdicts if v.suite == name], level, second) for name in names}


def _figures(verdicts: Sequence[Verdict], level: float, second: bool) -> SuiteFigures:
    harmful = [v for v in verdicts if v.kind == "harmful"]
    harmless = [v for v in verdicts if v.kind != "harmful"]

    def share(rows: Sequence[Verdict], flags: Sequence[bool | None]) -> Estimate:
        return clustered_share(flags, [v.prompt_id for v in rows], level)

    return SuiteFigures(
        unsafe_share=share(harmful, [v.unsafe for v in harmful]),
        second_unsafe_share=share(harmful, [v.second_unsafe for v in harmful]) if second else None,
        refused_harmful=share(harmful, [v.refused for v in harmful]),
        refused_harmless=share(harmless, [v.refused for v in harmless]),
        coherent_share=share(verdicts, [v.coherent for v in verdicts]),
        prompts=len({v.prompt_id for v in verdicts}),
    )
