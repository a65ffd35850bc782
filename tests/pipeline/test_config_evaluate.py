"""The section `evaluate`: which second judges are taken, and how many answers pass@k needs."""

import json

import pytest
import yaml

from ballast.errors import ConfigError
from ballast.pipeline.config_loading import dump_config, load_config

RULES = '{"type": "rules", "patterns": [{"pattern": "x", "risk": 1.0}]}'


def second(guard: str, *more: str, allow: bool = False):
    overrides = [f"evaluate.second_judge.guard={guard}", *more]
    return load_config("demo", [*overrides, "evaluate.second_judge.allow_same_kind=true"] if allow else overrides)


def test_a_guard_of_another_kind_is_taken_and_survives_the_dump(tmp_path):
    config = second(RULES)
    assert config.evaluate.second_judge is not None
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path), []) == config
    assert yaml.safe_load(path.read_text())["evaluate"]["second_judge"]["guard"]["type"] == "rules"


@pytest.mark.parametrize(("guard", "other"), [("ngram", "judge"), ("embedded", "guard")])
def test_the_double_of_another_judge_says_nothing_and_is_refused_whatever_is_allowed(guard, other):
    with pytest.raises(ConfigError, match=rf"evaluate.second_judge and {other} share one that decides .{guard}"):
        second(json.dumps({"type": guard}), allow=True)


def test_a_guard_of_one_kind_with_the_judge_is_taken_only_where_that_is_said():
    judge = 'judge={"type": "llama_guard", "model": "owner/one"}'
    other = '{"type": "llama_guard", "model": "owner/two"}'
    with pytest.raises(ConfigError, match=r"evaluate.second_judge and judge are of one kind .llama_guard"):
        second(other, judge)
    assert second(other, judge, allow=True).evaluate.second_judge is not None


def test_pass_at_k_needs_k_answers():
    assert load_config("demo", ["evaluate.pass_at=[1, 2]"]).evaluate.pass_at == (1, 2)
    with pytest.raises(ConfigError, match=r"pass@3 of evaluate.samples = 2 answers"):
        load_config("demo", ["evaluate.pass_at=[1, 3]"])


def test_an_empty_section_probes_everything():
    probes = load_config("demo", ["evaluate.probes={}"]).evaluate.probes
    assert probes is not None
    assert (probes.prefill, probes.role_play, probes.adaptation, probes.reward_gap) == (True,) * 4
    assert load_config("demo", []).evaluate.probes is None
