"""Dynamic Safety Shaping in a run's configuration: the terms, and the options of TRL's that they exclude.

What each term does and when to use it stands in docs/shaping.md.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveFloat

from ballast.pipeline.config_base import Component


class DropShaping(Component):
    """Charge a rise in risk to the segment in which it happens; never praise."""

    weight: NonNegativeFloat = Field(1.0, description="0 switches the term off")
    to_go: bool = Field(
        False, description="true charges a fall to every segment that led to it too, not to its own segment alone"
    )
    slack: float = Field(0.05, ge=0, lt=1, description="a fall of STAR below this counts as noise")
    std_floor: PositiveFloat = Field(0.1, description="smallest spread of a group that drops are divided by")


class PotentialShaping(Component):
    """Credit each segment with how the STAR of the whole answer differs from what it was before the segment."""

    weight: NonNegativeFloat = Field(0.0, description="0 switches the term off")
    std_floor: PositiveFloat = Field(0.1, description="smallest spread of a group that it is divided by")


class GateShaping(Component):
    """Scale a positive advantage down where the text has become unsafe."""

    enabled: bool = Field(True, description="false leaves the reward's advantage the same at every token")
    tau: float = Field(0.0, ge=0, lt=1, description="STAR at and below which no positive advantage is left")


class MaskShaping(Component):
    """No advantage from the rewards, neither praise nor blame, from the first unsafe segment on."""

    enabled: bool = Field(False, description="true sets the rewards' advantage to 0 there; other terms stay")
    tau: float = Field(0.5, gt=0, le=1, description="STAR below which a segment is unsafe")


class LagrangianShaping(Component):
    """Weigh the rewards against a limit on the share of unsafe completions; the price adapts to the share."""

    enabled: bool = Field(False, description="true mixes the constraint into the rewards' advantage")
    target: float = Field(0.05, ge=0, le=1, description="share of unsafe completions that is allowed")
    tau: float = Field(0.5, gt=0, le=1, description="lowest STAR below which a completion is unsafe")
    start: NonNegativeFloat = Field(1.0, description="the dual variable in the first step")
    step: PositiveFloat = Field(0.05, description="change of the dual variable, times the excess over the target")
    ema: float = Field(0.9, ge=0, lt=1, description="weight of the past in the moving average of the share; 0 has none")
    maximum: PositiveFloat = Field(10.0, description="largest dual variable")


class TokenKLShaping(Component):
    """Pull a token towards the reference, the more the riskier the text before its segment is."""

    weight: NonNegativeFloat = Field(
        0.0, description="0 switches the term off; above it every step costs a forward of the reference"
    )
    clip: PositiveFloat = Field(5.0, description="largest log-probability ratio of a token, either way")


class EarlyStop(Component):
    """Treat a completion as cut off after its first unsafe segment: what follows leaves the loss."""

    enabled: bool = Field(False, description="true takes the tokens after that segment out of the loss")
    tau: float = Field(0.5, gt=0, le=1, description="debounced STAR below which a segment is unsafe")


class ShapingConfig(Component):
    """Dynamic Safety Shaping: how segment scores become per-token advantages. Terms that are on are added."""

    drop: DropShaping = DropShaping()
    potential: PotentialShaping = PotentialShaping()
    gate: GateShaping = GateShaping()
    mask: MaskShaping = MaskShaping()
    lagrangian: LagrangianShaping = LagrangianShaping()
    kl: TokenKLShaping = TokenKLShaping()
    early_stop: EarlyStop = EarlyStop()
    clean_trace: bool = Field(
        True, description="debounce, then running minimum, so that a safe ending cannot undo harm"
    )


class WrongOption(NamedTuple):
    """An option of TRL's GRPO that cannot be combined with per-token advantages."""

    is_wrong: Callable[[Any], bool]
    reason: str
    instead: object


WRONG_OPTIONS: dict[str, WrongOption] = {
    "loss_type": WrongOption(lambda value: value in ("vespo", "luspo"), "it weighs whole sequences", "dapo"),
    "importance_sampling_level": WrongOption(
        lambda value: value != "token", "one ratio for a sequence cannot follow per-token advantages", "token"
    ),
    "off_policy_mask_threshold": WrongOption(
        lambda value: value is not None, "it reads one advantage a sequence", None
    ),
    "mask_truncated_completions": WrongOption(bool, "it empties the attention mask that segments are laid over", False),
    "top_entropy_quantile": WrongOption(
        lambda value: value != 1.0, "it would drop the tokens that a drop is charged to", 1.0
    ),
    "scale_rewards": WrongOption(lambda value: value != "group", "our group normalisation replaces it", "group"),
    "multi_objective_aggregation": WrongOption(
        lambda value: value != "sum_then_normalize", "our group normalisation replaces it", "sum_then_normalize"
    ),
}

KL_TWICE = (
    "the shaped per-token KL and TRL's own would count the same divergence twice; set train.beta to 0, or "
    "shaping.kl.weight to 0"
)


def refuse_wrong_options(section: str, options: Mapping[str, Any]) -> None:
    """Refuse what is wrong with per-token advantages, by the reason and not by an unknown key or value.

    Args:
        section: what the options belong to, as messages name it: "train", "GRPOConfig".
        options: options by TRL's names; only those that are there are looked at.

    Raises:
        ValueError: names the first wrong option, its value, the reason and what to set instead.
    """
    for name, rule in WRONG_OPTIONS.items():
        if name in options and rule.is_wrong(options[name]):
            raise ValueError(
                f"{section}.{name} = {options[name]!r} does not work with per-token advantages: {rule.reason}; "
                f"set {name}={rule.instead!r}"
            )
