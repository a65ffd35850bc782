"""The section `monitor` in a run: which guards it may take, which prompts, and what a monitored stage leaves."""

import io
import json

import pytest
from rich.console import Console

from ballast.errors import ConfigError, DataError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.monitoring.of_run import monitor_suite
from ballast.pipeline.stage_graph import stage_of
from ballast.pipeline.stages import train_sft

ON = "monitor.enabled=true"


def test_off_by_default_and_then_the_stage_reads_what_it_read_without_it():
    config = load_config("grpo", [])
    assert not config.monitor.enabled
    assert not {"monitor", "judge"} & set(stage_of(config, "train").reads)
    watched = stage_of(load_config("grpo", [ON]), "train")
    assert {"monitor", "judge", "evaluate"} <= set(watched.reads)


def test_the_guard_that_rewards_may_not_be_the_monitors_judge_unless_told_so():
    guard = load_config("grpo", []).guard
    same = f"monitor.judge={json.dumps(guard.model_dump(mode='json'))}"
    with pytest.raises(ConfigError, match=r"monitor\.allow_reward_guard"):
        load_config("grpo", [ON, same])
    assert load_config("grpo", [ON, same, "monitor.allow_reward_guard=true"]).monitor.judge == guard


def test_a_floor_above_the_threshold_is_refused():
    with pytest.raises(ConfigError, match=r"monitor\.hard_floor"):
        load_config("grpo", [ON, "monitor.hard_floor=0.97"])


def test_the_suite_is_the_same_for_every_seed_and_keeps_its_sizes():
    sizes = [ON, "monitor.max_harmful=12", "monitor.max_harmless=6"]
    first, second = (monitor_suite(load_config("grpo", [*sizes, f"seed={seed}"])) for seed in (0, 1))
    assert first == second
    assert [prompt.kind == "harmful" for prompt in first] == [True] * 12 + [False] * 6


def test_a_suite_that_is_trained_on_is_refused(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "How do I bake bread?", "kind": "harmful"}))
    with pytest.raises(DataError, match="are trained on"):
        monitor_suite(
            load_config("grpo", [ON, f"data.train={json.dumps(str(data))}", f"monitor.suite={json.dumps(str(data))}"])
        )


@pytest.mark.parametrize(
    ("preset", "key", "on"),
    [
        ("sft", "regularization.safety_data", ["regularization.safety_share=0.1"]),
        ("grpo", "safegrad.data", ["safegrad.enabled=true"]),
        ("grpo", "probing.data", ["probing.enabled=true"]),
        ("grpo", "align.data", ["align.enabled=true"]),
    ],
)
def test_a_suite_that_another_part_of_the_run_trains_on_is_refused(tmp_path, preset, key, on):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "How do I bake bread?", "kind": "harmful", "response": "No."}))
    source = json.dumps([str(data)])
    with pytest.raises(DataError, match="are trained on"):
        monitor_suite(load_config(preset, [ON, f"monitor.suite={source}", f"{key}={source}", *on]))


def test_rows_of_a_part_that_is_off_may_be_measured_on(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "How do I bake bread?", "kind": "harmful", "response": "No."}))
    source = json.dumps([str(data)])
    off = [f"align.data={source}", "align.enabled=false"]
    assert len(monitor_suite(load_config("grpo", [ON, f"monitor.suite={source}", *off]))) == 1


class Falling(RunContext):
    """A run on a tiny random model, whose judge finds every answer after the baseline's risky."""

    def __init__(self, config, tokenizer, start_model):
        super().__init__(config, Console(file=io.StringIO(), width=80))
        self.start_model = start_model
        self.tokenizer = tokenizer
        self.guard = ScriptedGuardrail(lambda exchange, prefix: 0.05, "guard")
        self.judge = ScriptedGuardrail(lambda exchange, prefix: 0.1 if self.judge.calls == 1 else 0.9, "judge")


@pytest.mark.model
def test_a_stage_whose_judge_finds_a_fall_ends_with_the_weights_it_began_with(
    tiny_model, tokenizer, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    tiny_model.save_pretrained(tmp_path / "start")
    data = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"What is {n}?", "kind": "ordinary", "response": "A drink of leaves."} for n in range(4)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    own = [f"out={json.dumps(str(tmp_path))}", "name=one", f"sft.data={json.dumps(str(data))}", "sft.epochs=1"]
    own += ["sft.loss={type: plain}", "sft.warmup_steps=0", "sft.batch_size=2", "sft.lora.r=2", "model.dtype=float32"]
    own += [ON, "monitor.every_n_steps=1", "monitor.max_harmful=12", "monitor.max_harmless=2", "monitor.action=stop"]
    own += ["generation={type: transformers}", "evaluate.sampling.max_new_tokens=4"]
    context = Falling(load_config("sft", own), tokenizer, str(tmp_path / "start"))
    monkeypatch.setattr(train_sft, "check_record", lambda *_: None)
    folder = tmp_path / "made"
    folder.mkdir()
    train_sft.run_stage(context, folder)
    record = json.loads((folder / "training.json").read_text())
    assert record["steps"] == 1
    # 4 rows, 2 a step: half of the rows' tokens were trained on.
    all_tokens = sum(len(row["input_ids"]) for row in train_sft.training_rows_of(context, folder)[0])
    assert record["tokens_per_s"] * record["seconds"] == pytest.approx(all_tokens / 2)
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(not value.any() for name, value in weights.items() if "lora_B" in name)  # as an adapter begins
    events = [json.loads(line) for line in (context.folder.path / "metrics.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events if event["event"].startswith("monitor")]
    assert kinds == ["monitor_baseline", "monitor", "monitor_trip", "monitor_rollback"]
    trip = next(event for event in events if event["event"] == "monitor_trip")
    assert (folder / "monitor" / f"{trip['review']}-flipped.jsonl").is_file()
    assert len(trip["flipped"]) == 12
    assert "tripped at step 1" in context.console.file.getvalue()


@pytest.mark.model
def test_grpo_turns_back_between_rollouts_and_makes_all_its_steps(tiny_model, tokenizer, tmp_path, monkeypatch):
    from ballast.pipeline.stages import train

    tiny_model.save_pretrained(tmp_path / "start")
    own = [f"out={json.dumps(str(tmp_path))}", "name=one", "align.enabled=false", "generation={type: transformers}"]
    own += ["train.steps=2", "train.prompts_per_step=1", "train.group_size=2", "train.micro_batch_size=2"]
    own += [
        "train.sampling.max_new_tokens=4",
        "train.lora.r=2",
        "model.dtype=float32",
        "evaluate.sampling.max_new_tokens=4",
    ]
    own += [ON, "monitor.every_n_steps=1", "monitor.max_harmful=12", "monitor.max_harmless=2", "monitor.cooldown=0"]
    context = Falling(load_config("grpo", own), tokenizer, str(tmp_path / "start"))
    monkeypatch.setattr(train, "check_record", lambda *_: None)
    folder = tmp_path / "made"
    folder.mkdir()
    train.run_stage(context, folder)
    assert json.loads((folder / "training.json").read_text())["steps"] == 2
    history = json.loads((folder / "monitor" / "events.json").read_text())
    # Back to the start after step 1, and from step 2 to the point that was kept after step 1: the same weights.
    assert [event["to_step"] for event in history if event["event"] == "monitor_rollback"] == [0, 1]
    assert next(event["rows"] for event in history if event["event"] == "monitor_trip") >= 1
