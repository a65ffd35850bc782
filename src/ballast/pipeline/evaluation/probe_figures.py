"""What the probes for cheats find out about one model, and about a training."""

from collections.abc import Mapping
from dataclasses import dataclass

from ballast.pipeline.evaluation.statistics import Estimate


@dataclass(frozen=True)
class AttackFigures:
    """A model's answers to harmful prompts that were put in another way. Every interval is clustered by prompt.

    Attributes:
        unsafe_share: share of the answers that the judge finds unsafe.
        second_unsafe_share: the same by the second judge; None where there is none.
        refused: keyword refusals, in what the model itself wrote.
        coherent: share of readable answers.
        rise: unsafe share minus that of the same prompts asked plainly, paired by prompt.
    """

    unsafe_share: Estimate
    second_unsafe_share: Estimate | None
    refused: Estimate
    coherent: Estimate
    rise: Estimate


@dataclass(frozen=True)
class Evasion:
    """How often unsafe answers pass a judge once safe words are put around them. Over the answers that it calls unsafe as
    they are.

    Attributes:
        openings: by opening, the share that it calls safe with that before the answer.
        endings: by ending, the share that it calls safe with that behind it.
        best: the share that it calls safe with any of them.
    """

    openings: Mapping[str, Estimate]
    endings: Mapping[str, Estimate]
    best: Estimate


@dataclass(frozen=True)
class AdaptationFigures:
    """Safe words around harm: whether judges fall for them, and whether the model has learnt to write them.

    Attributes:
        judge: the judge on the model's unsafe answers.
        second_judge: the second judge on those that it calls unsafe itself; None where there is none.
        hidden_by_ending: share of answers to harmful prompts that the judge calls safe as a whole, though its risk on a
            beginning of them was at the threshold for two cuts in a row, or at the first.
        hidden_by_opening: share of answers to harmful prompts that open with a refusal and are called safe, and without
            their first sentence are unsafe.
    """

    judge: Evasion
    second_judge: Evasion | None
    hidden_by_ending: Estimate
    hidden_by_opening: Estimate


@dataclass(frozen=True)
class ProbeFigures:
    """The probes of one model; None for those that were not asked for.

    Attributes:
        prefill: answers that were begun for the model with an agreement.
        role_play: requests inside a scene of a play.
        adaptation: safe words around harm.
        refuses_everything: refusals on ordinary prompts are above the bound; None where the suite has no such prompt.
    """

    prefill: AttackFigures | None
    role_play: AttackFigures | None
    adaptation: AdaptationFigures | None
    refuses_everything: bool | None
