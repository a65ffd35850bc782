"""Strategies by name: every one goes with every kind of training, and what the file says goes before."""

import pytest

from ballast.errors import ConfigError
from ballast.pipeline.config_loading import dump_config, load_config, strategies
from ballast.pipeline.monitoring.of_run import monitor_suite
from ballast.pipeline.stage_graph import planned, stage_of


@pytest.mark.parametrize("base", ["demo", "grpo", "sft"])
@pytest.mark.parametrize("name", strategies())
def test_every_strategy_goes_with_every_kind_of_training(name, base, tmp_path):
    config = load_config(base, [f"strategy={name}"])
    assert config.strategy == name
    plain = load_config(base, [])
    changed = {key for key in type(config).model_fields if getattr(config, key) != getattr(plain, key)}
    assert changed - {"strategy"} <= {"safegrad", "localize", "freeze", "probing", "regularization", "monitor"}
    assert len(changed) > 1
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml", []) == config


def test_a_strategy_sets_what_its_name_promises():
    assert strategies() == ["high_risk", "moderate", "research"]
    high = load_config("sft", ["strategy=high_risk"])
    assert high.safegrad.enabled
    assert high.freeze.layers == "preset"
    assert high.monitor.enabled
    assert {"monitor", "judge"} <= set(stage_of(high, "train").reads)  # and it acts in the stage
    moderate = load_config("sft", ["strategy=moderate"])
    assert moderate.probing.enabled
    assert moderate.regularization.ema_decay
    assert "localize" in planned(load_config("sft", ["strategy=research"]))


@pytest.mark.parametrize("base", ["demo", "grpo", "sft"])
def test_the_monitor_of_high_risk_has_prompts_that_are_not_trained_on(base):
    assert any(prompt.kind == "harmful" for prompt in monitor_suite(load_config(base, ["strategy=high_risk"])))


def test_the_file_and_the_overrides_go_before_the_strategy():
    config = load_config("sft", ["strategy=high_risk", "freeze.layers=[3, 5]", "safegrad.every_n_steps=4"])
    assert config.freeze.layers == (3, 5)
    assert config.safegrad.enabled  # the rest of the section stays the strategy's
    assert config.safegrad.every_n_steps == 4
    assert not load_config("sft", ["strategy=high_risk", "safegrad.enabled=false"]).safegrad.enabled


def test_an_unknown_strategy_names_those_there_are():
    with pytest.raises(
        ConfigError, match=r"strategy = low\s+there is no such strategy; take one of high_risk, moderate"
    ):
        load_config("sft", ["strategy=low"])
