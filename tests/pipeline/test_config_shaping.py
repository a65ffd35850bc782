"""What a configuration says about shaping: refused by the reason, before anything heavy is imported."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_shaping import WRONG_OPTIONS

BASE = {"name": "a", "model": {"name": "m"}, "guard": {"type": "embedded"}, "judge": {"type": "ngram"}}


def parse(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(BASE | sections)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("loss_type", "vespo"),
        ("loss_type", "luspo"),
        ("importance_sampling_level", "sequence"),
        ("off_policy_mask_threshold", 0.5),
        ("mask_truncated_completions", True),
        ("top_entropy_quantile", 0.5),
        ("scale_rewards", "batch"),
        ("multi_objective_aggregation", "normalize_then_sum"),
    ],
)
def test_an_option_that_is_wrong_per_token_is_refused_by_its_reason(option: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(train={option: value})
    assert f"train.{option} = {value!r} does not work with per-token advantages" in str(caught.value)
    assert WRONG_OPTIONS[option].reason in str(caught.value)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_losses_that_follow_tokens_are_taken(loss_type: str) -> None:
    assert parse(train={"loss_type": loss_type}).train.loss_type == loss_type


def test_two_kl_terms_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"shaping\.kl\.weight = 0\.1 with train\.beta = 0\.04.*twice"):
        parse(train={"beta": 0.04}, shaping={"kl": {"weight": 0.1}})
    parse(train={"beta": 0.04})
    parse(shaping={"kl": {"weight": 0.1}})


@pytest.mark.parametrize("term", [{"potential": {"weight": 1.0}}, {"lagrangian": {"enabled": True}}])
def test_a_shaping_term_alone_is_something_to_learn(term: dict[str, Any]) -> None:
    nothing = {"star": 0, "refusal": 0, "coherence": 0}
    off = {"drop": {"weight": 0}}
    with pytest.raises(ValidationError, match="every advantage would be 0"):
        parse(rewards=nothing, shaping=off)
    parse(rewards=nothing, shaping=off | term)


def test_the_defaults_are_gate_and_drop_alone() -> None:
    shaping = parse().shaping
    assert (shaping.gate.enabled, shaping.drop.weight, shaping.drop.to_go) == (True, 1.0, False)
    assert not any(term.enabled for term in (shaping.mask, shaping.lagrangian, shaping.early_stop))
    assert (shaping.potential.weight, shaping.kl.weight) == (0.0, 0.0)


def test_refusing_needs_no_torch() -> None:
    code = "import sys, ballast.pipeline.config; assert not {'torch', 'trl', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
