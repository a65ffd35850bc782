"""The section `safegrad`: off unless asked for, its rows checked before the first stage, its callback in both kinds of training."""

import io
import json

import pytest
from rich.console import Console

from ballast.errors import ConfigError, DataError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline.config_loading import dump_config, load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.run_checks import check_parts
from ballast.pipeline.safe_updates import safegrad_callbacks, safegrad_rows
from ballast.pipeline.safety_layers import preference_rows, safety_rows
from ballast.pipeline.stage_graph import stage_of, stage_settings
from ballast.pipeline.stages import train_sft

ROWS = [
    {"prompt": "How do I bake bread?", "kind": "ordinary", "response": "Mix flour with water and salt, then bake it."},
    {"prompt": "What is tea?", "kind": "ordinary", "response": "A drink of leaves in hot water."},
]


@pytest.fixture
def configured(tmp_path):
    data = tmp_path / "answers.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))

    def configure(*overrides):
        own = [f"out={json.dumps(str(tmp_path))}", "name=one", f"sft.data={json.dumps(str(data))}", "sft.epochs=2"]
        return load_config("sft", [*own, "model.dtype=float32", *overrides])

    return configure


def test_off_is_the_default_and_makes_no_callback(configured):
    config = configured()
    assert not config.safegrad.enabled
    assert safegrad_callbacks(RunContext(config, Console(file=io.StringIO()))) == []
    assert "safegrad.data" not in stage_of(config, "train").data


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_on_the_training_depends_on_the_alignment_rows(configured, method):
    config = configured("safegrad.enabled=true", f"train.method={method}")
    stage = stage_of(config, "train")
    assert "safegrad.data" in stage.data
    assert ("sft.data" in stage.data) == (method == "sft")
    assert stage_settings(config, "train")["safegrad"]["rho"] == 1.0
    assert stage_settings(config, "evaluate")["safegrad"]["rho"] == 1.0


def test_what_is_written_down_is_read_back(configured, tmp_path):
    config = configured("safegrad.enabled=true", "safegrad.mode=watchdog", "safegrad.budget=0.1")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml", []) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["safegrad.mode=watchdog", "safegrad.rho=2"], r"safegrad\.rho = 2\.0 acts in mode project alone"),
        (["safegrad.margin=0.1"], r"safegrad\.margin = 0\.1 acts in mode trust_region alone"),
        (["safegrad.rho=0", "safegrad.projection=none"], "changes no update"),
        (["safegrad.every_n_steps=0"], r"safegrad\.every_n_steps"),
    ],
)
def test_what_would_do_nothing_is_refused_with_the_reason(configured, overrides, message):
    with pytest.raises(ConfigError, match=message):
        configured("safegrad.enabled=true", *overrides)


def test_alignment_rows_that_are_measured_on_stop_the_run_before_its_first_stage(configured, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps(ROWS[0]))
    config = configured(
        "safegrad.enabled=true",
        f"safegrad.data={json.dumps(str(tmp_path / 'answers.jsonl'))}",
        f"data.test={json.dumps(str(test))}",
    )
    with pytest.raises(DataError, match=r"1 of 2 rows of safegrad\.data are prompts of data\.test too"):
        check_parts(RunContext(config, Console(file=io.StringIO())), ["train"])


@pytest.mark.parametrize("measured", ["data.test", "monitor.suite"])
@pytest.mark.parametrize(
    ("key", "rows_of"),
    [
        ("safegrad.data", safegrad_rows),
        ("probing.data", preference_rows),
        ("regularization.safety_data", lambda config: safety_rows(config, [])),
    ],
)
def test_no_row_of_a_safe_update_is_measured_on(configured, tmp_path, key, rows_of, measured):
    held_out, own = tmp_path / "held_out.jsonl", tmp_path / "own.jsonl"
    row = {"prompt": "A harmful request", "kind": "harmful", "response": "No."}
    held_out.write_text(json.dumps(row))
    own.write_text("\n".join(json.dumps(each) for each in (row, row | {"prompt": "Another one"})))
    config = configured(
        "regularization.safety_share=0.1",
        "monitor.enabled=true",
        f"{key}={json.dumps(str(own))}",
        f"{measured}={json.dumps(str(held_out))}",
    )
    with pytest.raises(DataError, match=rf"1 of 2 rows of {key} are prompts of {measured} too"):
        rows_of(config)


@pytest.mark.model
@pytest.mark.parametrize("mode", ["project", "trust_region", "watchdog"])
def test_the_stage_trains_with_it_and_its_figures_are_in_the_metrics(
    configured, tiny_model, tokenizer, tmp_path, monkeypatch, mode
):
    tiny_model.save_pretrained(tmp_path / "start")
    monkeypatch.setattr(train_sft, "check_record", lambda *_: None)
    context = RunContext(
        configured("safegrad.enabled=true", f"safegrad.mode={mode}", "safegrad.max_rows=3", "sft.lora.r=2", "sft.warmup_steps=0"),
        Console(file=io.StringIO()),
    )  # fmt: skip
    context.start_model, context.tokenizer = str(tmp_path / "start"), tokenizer
    context.guard = ScriptedGuardrail(lambda exchange, prefix: 0.05, "guard")
    folder = tmp_path / "made"
    folder.mkdir()
    train_sft.run_stage(context, folder)
    steps = [json.loads(line) for line in (context.folder.path / "metrics.jsonl").read_text().splitlines()]
    figure = {"project": "alignment_kl", "trust_region": "trust_loss", "watchdog": "watchdog_loss"}[mode]
    assert len(steps) == 2
    assert all(f"safegrad/{figure}" in step for step in steps)
