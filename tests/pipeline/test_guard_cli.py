"""`ballast guard`: what there is, whether one keeps the contract, and what one says of a file."""

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ballast.guardrails.contract import check_guardrail
from ballast.guardrails.registry import BUILT_INS, load_guardrail
from ballast.pipeline import cli
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext


def invoke(*words: object, **more):
    return CliRunner().invoke(cli.app, ["guard", *map(str, words)], **more)


def rows(result) -> dict[str, str]:
    """Lines of a table by their first cell."""
    return {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}


def test_list_says_of_every_built_in_whether_it_may_be_a_reward():
    listed = rows(invoke("list"))
    assert set(listed) >= set(BUILT_INS)
    assert "Apache-2.0" in listed["rules"]
    assert "yes" in listed["rules"].split()


def test_list_with_models_names_the_licences_that_forbid_a_reward():
    listed = rows(invoke("list", "--models"))
    for model in ("llamaguard-7b", "meta-llama-guard-2", "harmbench-llama-2"):
        assert "no" in listed[model].split()
    assert "conditions" in listed["llama-guard-4"].split()


def test_check_says_which_rules_held_and_the_licence():
    result = invoke("check", "rules")
    assert result.exit_code == 0, result.output
    assert "guardrail 'rules' keeps the contract" in result.stdout
    assert "licence  Apache-2.0: may be used as a reward" in result.stdout
    held = [line.removeprefix("ok  ") for line in result.stdout.splitlines() if line.startswith("ok  ")]
    assert held == list(check_guardrail(load_guardrail("rules")).checks)


def test_check_of_an_unknown_guard_exits_with_2_and_the_nearest_name():
    result = invoke("check", "ruls")
    assert result.exit_code == 2
    assert "did you mean 'rules'?" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rules", "--set", "no_such_option=1"), "no_such_option"),
        (("rules", "--set", "base_risk"), "not of the form key=value"),
        (("rules", "--set", "base_risk=7"), "less than or equal to 1"),
        ((), "no guard is named"),
        (("rules", "--config", "absent.yaml"), "no such file"),
    ],
)
def test_options_that_cannot_be_used_exit_with_2_and_say_which(words, said):
    result = invoke("check", *words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_options_come_from_a_file_of_their_own_or_from_a_run_and_set_goes_over_them(tmp_path):
    own, run = tmp_path / "guard.yaml", tmp_path / "run.yaml"
    own.write_text("type: rules\nbase_risk: 0.5")
    run.write_text("name: x\nguard: {type: rules, base_risk: 0.5}\njudge: {type: ngram}")
    settings = cli.guard_cli.guard_settings
    assert settings(None, (), str(own)) == {"type": "rules", "base_risk": 0.5}
    assert settings(None, ["base_risk=0.25"], str(run)) == {"type": "rules", "base_risk": 0.25}
    assert settings("judge", (), str(run)) == {"type": "ngram"}
    assert settings("rules", ["engine.type=server", "engine.base_url=x"], None)["engine"] == {
        "type": "server",
        "base_url": "x",
    }
    assert invoke("check", "ngram", "--config", own).exit_code == 2


def test_training_under_a_licence_that_forbids_it_is_warned_of_once_and_measuring_is_not(tmp_path):
    from ballast.pipeline.run import _check_parts

    def said(*stages: str, model: str) -> str:
        config = load_config("demo", ["guard.type=prompted", f"guard.model={model}", f"out={tmp_path}"])
        context = RunContext(config, Console(file=io.StringIO(), width=1000))
        _check_parts(context, stages)
        return context.console.file.getvalue()

    warning = said("train", "evaluate", model="meta-llama/Meta-Llama-Guard-2-8B")
    assert warning.count("Llama 3 Community") == 1
    assert "take another guard" in warning
    assert said("evaluate", model="meta-llama/Meta-Llama-Guard-2-8B") == ""
    assert said("train", model="Qwen/Qwen3Guard-Gen-0.6B") == ""
