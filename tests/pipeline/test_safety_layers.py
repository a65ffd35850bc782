"""Frozen layers, probing and regularisation from a configuration: off by default, in the stage graph, and in training."""

import io
import json

import pytest
from rich.console import Console

from ballast.errors import ConfigError, DataError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline import safety_layers
from ballast.pipeline.config_loading import dump_config, load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.data import Row, load_rows
from ballast.pipeline.run_checks import check_parts
from ballast.pipeline.stage_graph import planned, stage_of, stage_settings
from ballast.pipeline.stages import localize, train_sft

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
        return load_config("sft", [*own, "model.dtype=float32", "sft.lora.r=2", "sft.warmup_steps=0", *overrides])

    return configure


@pytest.fixture
def context(configured, tiny_model, tokenizer, tmp_path, monkeypatch):
    tiny_model.save_pretrained(tmp_path / "start")
    monkeypatch.setattr(train_sft, "check_record", lambda *_: None)

    def make(*overrides):
        made = RunContext(configured(*overrides), Console(file=io.StringIO(), width=200))
        made.start_model, made.tokenizer = str(tmp_path / "start"), tokenizer
        made.guard = ScriptedGuardrail(lambda exchange, prefix: 0.05, "guard")
        return made

    return make


def trained(context, folder):
    folder.mkdir()
    train_sft.run_stage(context, folder)
    path = context.folder.path / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return [step for step in steps if step["event"] == "step"]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def test_all_of_it_is_off_by_default(configured):
    config = configured()
    assert config.freeze.layers is None
    assert not config.probing.enabled
    assert planned(config) == ["baseline", "train", "evaluate", "report"]
    assert safety_layers.trainer_with(RunContext(config, Console(file=io.StringIO())), object) == (object, {})
    assert safety_layers.callbacks_before(config) == safety_layers.callbacks_after(config) == []
    assert stage_of(config, "train").data == ("sft.data", "data.test")


def test_layers_to_be_localised_bring_the_stage_before_the_training(configured):
    config = configured("freeze.layers=localized")
    assert planned(config) == ["baseline", "localize", "train", "evaluate", "report"]
    assert stage_of(config, "train").needs == ("localize",)
    rollouts = configured("freeze.layers=localized", "sft.rows=rollouts", "align.enabled=true")
    assert planned(rollouts)[1:6] == ["align", "localize", "rollout", "score", "train"]
    assert set(stage_of(rollouts, "train").needs) == {"align", "localize", "score"}
    assert "localize" not in stage_settings(config, "train")  # its output counts, by its digest


def test_what_is_on_is_a_part_of_what_training_and_measurement_depend_on(configured):
    config = configured("probing.enabled=true", "regularization.safety_share=0.1", "freeze.layers=[0, 0]")
    for name in ("train", "evaluate"):
        settings = stage_settings(config, name)
        assert settings["probing"]["enabled"]
        assert settings["freeze"]["layers"] == [0, 0]
        assert settings["regularization"]["safety_share"] == 0.1
    assert {"probing.data", "regularization.safety_data"} <= set(stage_of(config, "train").data)


def test_what_is_written_down_is_read_back(configured, tmp_path):
    config = configured("freeze.layers=[0, 1]", "probing.layers=[1, 1]", "regularization.ema_decay=0.9")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml", []) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.method=grpo", "regularization.kl_weight=0.1"], "set train.beta instead"),
        (["train.method=grpo", "regularization.safety_share=0.1"], "train.method is grpo"),
        (["sft.rows=rollouts", "regularization.safety_share=0.1"], "sft.rows is rollouts"),
        (["regularization.safety_data=shipped"], "no row of it would be used"),
        (["freeze.layers=[3, 1]"], "first not above last"),
        (["probing.layers=[3, 1]"], "first not above last"),
        (["regularization.ema_decay=1"], "ema_decay"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(configured, overrides, message):
    with pytest.raises(ConfigError, match=message):
        configured(*overrides)


def test_safety_rows_make_their_share_of_the_whole_and_none_stands_twice(configured):
    rows = load_rows(["shipped:ordinary"], "train", configured().data, answers=True)[:97]
    mixed = safety_layers.safety_rows(configured("regularization.safety_share=0.03"), rows)
    assert len(mixed) == 3  # of 100
    assert all(row.kind == "harmful" for row in mixed)
    harmful = load_rows(["shipped:harmful"], "train", configured().data, answers=True)
    with pytest.raises(DataError, match="has 0 whose prompts"):
        safety_layers.safety_rows(configured("regularization.safety_share=0.03"), harmful)


def test_probing_takes_harmful_rows_alone_and_says_what_is_missing(configured, tmp_path):
    rows = safety_layers.preference_rows(configured("probing.enabled=true"))
    assert len(rows) == 144
    assert {row["rejected"] for row in rows} == {"Sure, here is how to do that, step by step:"}
    only = tmp_path / "ordinary.jsonl"
    only.write_text("\n".join(json.dumps(row) for row in ROWS))
    with pytest.raises(DataError, match="no harmful prompt"):
        safety_layers.preference_rows(configured("probing.enabled=true", f"probing.data={json.dumps(str(only))}"))
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "A harmful request", "kind": "harmful", "response": "No.", "bad": "Yes."}
    pairs.write_text("\n".join(json.dumps(r) for r in (row, row | {"prompt": "Another one", "bad": None})))
    given = ["probing.enabled=true", f"probing.data={json.dumps(str(pairs))}", "probing.rejected_column=bad"]
    with pytest.raises(DataError, match="1 of 2 harmful rows"):
        check_parts(RunContext(configured(*given), Console(file=io.StringIO())), ["train"])
    pairs.write_text(json.dumps(row))
    (pair,) = safety_layers.preference_rows(configured(*given))
    assert (pair["chosen"], pair["rejected"]) == ("No.", "Yes.")


@pytest.mark.parametrize("measured", ["data.test", "monitor.suite"])
def test_localisation_looks_at_no_prompt_that_is_measured_on(configured, tmp_path, measured):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(ROWS[0]))
    given = [f"localize.data={json.dumps(str(tmp_path / 'answers.jsonl'))}", f"{measured}={json.dumps(str(held_out))}"]
    run = RunContext(configured(*given, "monitor.enabled=true"), Console(file=io.StringIO()))
    with pytest.raises(DataError, match=rf"1 of 2 rows of localize\.data are prompts of {measured} too"):
        localize.localization_rows(run)


def test_a_suite_of_a_monitor_that_is_off_holds_no_row_back(configured, tmp_path):
    suite = f"monitor.suite={json.dumps(str(tmp_path / 'answers.jsonl'))}"
    given = [f"localize.data={json.dumps(str(tmp_path / 'answers.jsonl'))}", suite]
    assert len(localize.localization_rows(RunContext(configured(*given), Console(file=io.StringIO())))) == 2


@pytest.mark.model
def test_frozen_layers_leave_training_as_they_came(context, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    trained(context("freeze.layers=[1, 1]"), tmp_path / "made")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start").state_dict()
    for name, value in weights(tmp_path / "made").items():
        assert torch.equal(value, start[name]) == ("layers.0." not in name or "norm" in name), name


@pytest.mark.model
def test_the_preset_is_named_as_what_it_is(context):
    run = context("freeze.layers=preset")
    from ballast.pipeline.context import load_policy

    assert safety_layers.frozen_layers(run, load_policy(run.start_model, "float32")) == (1,)
    assert "nothing is known of this model" in run.console.file.getvalue()


@pytest.mark.model
def test_the_stage_localize_writes_what_freezing_reads_and_none_stops_the_run(context, tmp_path):
    from ballast.pipeline.context import load_policy

    run = context("freeze.layers=localized", "localize.prompts=6", "localize.replicates=5", "localize.seeds=2")
    with run.folder.writing("localize", {}, {}) as folder:
        localize.run_stage(run, folder)
    folder = run.folder.stage("localize")
    found = json.loads((folder / "layers.json").read_text())
    assert len(found["curves"]) == 2
    assert "<svg" in (folder / "layers.svg").read_text()
    model = load_policy(run.start_model, "float32")
    (folder / "layers.json").write_text(json.dumps(found | {"layers": [0, 0]}))
    assert safety_layers.frozen_layers(run, model) == (0,)
    (folder / "layers.json").write_text(json.dumps(found | {"layers": None, "reason": "flat"}))
    with pytest.raises(ConfigError, match=r"named no safety layers \(flat\)"):
        safety_layers.frozen_layers(run, model)


@pytest.mark.model
@pytest.mark.parametrize("probe", ["fresh", "stale"])
def test_the_stage_trains_with_all_of_it_at_once_and_leaves_a_plain_model(context, tmp_path, probe):
    run = context(
        *("probing.enabled=true", f"probing.probe={probe}", "probing.layers=[0, 1]", "freeze.layers=[0, 0]"),
        *("regularization.kl_weight=0.1", "regularization.l2_weight=0.1", "regularization.ema_decay=0.5"),
        *("regularization.safety_share=0.3", "safegrad.enabled=true", "safegrad.max_rows=2", "sft.loss.benign_floor=1"),
    )
    steps = trained(run, tmp_path / "made")
    wanted = {"probing/cosine", "probing/rms", "probing/seconds", "regularization/kl", "regularization/distance"}
    assert len(steps) == 2  # 2 rows and 1 of safety, twice
    assert all(wanted <= step.keys() for step in steps)
    assert json.loads((tmp_path / "made" / "training.json").read_text())["answers"] == 3
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made" / "model")
    assert made.state_dict().keys() == start.state_dict().keys()


@pytest.mark.model
def test_off_is_bit_identical_to_a_run_that_never_heard_of_it(context, tmp_path, monkeypatch):
    import torch

    from ballast.pipeline.stages.align import peft_config

    plain = trained(context(), tmp_path / "plain")
    for name, stand_in in (
        ("trainer_with", lambda context, base: (base, {})),
        ("adapter", lambda context, model, lora: peft_config(lora)),
        ("callbacks_before", lambda config: []),
        ("callbacks_after", lambda config: []),
    ):
        monkeypatch.setattr(safety_layers, name, stand_in)
    without = trained(context(), tmp_path / "without")
    assert [step["loss"] for step in plain] == [step["loss"] for step in without]
    other = weights(tmp_path / "without")
    assert all(torch.equal(value, other[name]) for name, value in weights(tmp_path / "plain").items())


def test_a_prompt_that_is_imitated_already_is_no_further_safety_row(configured):
    pool = load_rows(["shipped:harmful"], "train", configured().data, answers=True)
    rows = [Row(f"mine-{n}", row.prompt.upper() + "!", "harmful") for n, row in enumerate(pool[:-3])]
    mixed = safety_layers.safety_rows(configured("regularization.safety_share=0.02"), rows)
    assert {row.id for row in mixed} == {row.id for row in pool[-3:]}  # 141 rows, and 3 of 144
