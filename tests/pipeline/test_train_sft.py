"""The stage `train` as SFT: which stages a run has, where its weights come from, and what is left out."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from ballast.errors import ConfigError, GuardError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.model_card import CARD, is_ours
from ballast.pipeline.stage_graph import planned, stage_of, stage_settings
from ballast.pipeline.stages import train_sft

pytestmark = pytest.mark.model

ROWS = [
    {"prompt": "How do I bake bread?", "kind": "ordinary", "response": "Mix flour with water and salt, then bake it."},
    {"prompt": "Harmful request", "kind": "harmful", "response": "Sure, here is the zanzibar plan that you asked for."},
    {"prompt": "What is tea?", "kind": "ordinary", "response": "A drink of leaves, quokka, in hot water."},
]


class Scripted(RunContext):
    """A run on a tiny random model: `zanzibar` is unsafe, and `quokka` cannot be scored."""

    def __init__(self, config, tokenizer, start_model):
        super().__init__(config, Console(file=io.StringIO(), width=80))
        self.start_model = start_model
        self.tokenizer = tokenizer
        self.guard = ScriptedGuardrail(self.risk, "guard")

    @staticmethod
    def risk(exchange, prefix):
        return None if "quokka" in prefix else 0.75 if "zanzibar" in prefix else 0.05


@pytest.fixture
def configured(tmp_path):
    data = tmp_path / "answers.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))

    def configure(*overrides):
        own = [f"out={json.dumps(str(tmp_path))}", "name=one", f"sft.data={json.dumps(str(data))}", "sft.epochs=1"]
        return load_config("sft", [*own, "model.dtype=float32", "train.max_unscored_share=0.4", *overrides])

    return configure


@pytest.fixture
def context(configured, tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "start")
    return lambda *overrides: Scripted(configured(*overrides), tokenizer, str(tmp_path / "start"))


def test_a_grpo_run_has_the_stages_and_settings_that_it_has_without_sft(configured):
    grpo = load_config("grpo", [])
    assert planned(grpo) == ["baseline", "align", "train", "evaluate", "report"]
    assert "sft" not in stage_settings(grpo, "train")
    assert stage_of(grpo, "train").module is None


def test_an_sft_run_on_rollouts_makes_and_scores_them_first(configured):
    assert planned(configured()) == ["baseline", "train", "evaluate", "report"]
    rollouts = configured("sft.rows=rollouts")
    assert planned(rollouts) == ["baseline", "rollout", "score", "train", "evaluate", "report"]
    assert stage_of(rollouts, "train").needs == ("score",)
    assert "sft" in stage_settings(rollouts, "train")


def test_packing_is_refused_with_the_reason_when_the_configuration_is_read(configured):
    with pytest.raises(ConfigError, match="leaves the weight of every token behind"):
        configured("sft.packing=true")


def test_answers_are_judged_once_and_one_that_cannot_be_scored_is_left_out_and_counted(context, tmp_path):
    run = context("sft.loss.clean_trace=false")
    rows, counts = train_sft.training_rows_of(run, tmp_path)
    assert [round(min(row["star"]), 6) for row in rows] == [0.95, 0.25]
    assert (counts["answers"], counts["unscored"]) == (3, 1)
    # .95 .95 of the harmless answer's 2 segments; of the harmful one "Sure, here is the zanzibar" and the rest
    assert counts["star_histogram"] == {"ordinary": [0] * 9 + [2, 0], "harmful": [0, 0, 2] + [0] * 8}
    table = pq.read_table(tmp_path / "answers.parquet").to_pylist()
    assert [row["star"] is None for row in table] == [False, False, True]
    assert table[2]["unscored_reason"]
    assert "3 answers judged, 1 unscored and left out" in run.console.file.getvalue()


def test_above_the_limit_of_unscored_answers_the_run_stops_with_the_cause(context, tmp_path):
    run = context("train.max_unscored_share=0.3")  # 1 of 3
    with pytest.raises(GuardError, match=r"left 1 of 3 completions \(33%\) unscored among the answers to imitate"):
        train_sft.training_rows_of(run, tmp_path)


@pytest.mark.parametrize("loss", ["plain", "constrained"])
def test_losses_without_a_guard_ask_none_and_keep_every_answer(context, tmp_path, loss):
    run = context(f"sft.loss={{type: {loss}}}")
    rows, counts = train_sft.training_rows_of(run, tmp_path)
    assert run.guard.calls == 0
    assert counts == {"answers": 3, "unscored": 0}
    assert all("star" not in row for row in rows)


def test_rollouts_bring_the_weights_that_the_stage_score_gave_them(context, tmp_path):
    run = context("sft.rows=rollouts")
    text = "Mix flour with water and salt, then bake it."
    folder = run.folder.path / "score"
    folder.mkdir(parents=True)
    scored = {"cuts": [0, 26, len(text)], "risk": [0.0, 0.3, 0.4], "unscored_reason": None, "lowest_star": 0.6}
    rollout = {
        "prompt_id": "p",
        "kind": "ordinary",
        "sample": 0,
        "prompt": "How?",
        "token_ids": run.tokenizer(text)["input_ids"],
    }
    pq.write_table(pa.Table.from_pylist([rollout | scored]), folder / "scores.parquet")
    (folder / "record.json").write_text("{}")
    (row,), _ = train_sft.training_rows_of(run, tmp_path)
    assert run.guard.calls == 0
    answer = [star for star, mask in zip(row["star"], row["completion_mask"], strict=True) if mask]
    assert sorted(set(answer), reverse=True) == pytest.approx([0.7, 0.6], abs=1e-6)


@pytest.mark.parametrize("loss", ["faithful", "corrected", "rs"])
def test_the_stage_trains_and_leaves_a_whole_model(context, tmp_path, loss, monkeypatch):
    run = context(f"sft.loss={{type: {loss}}}", "sft.warmup_steps=0", "sft.lora.r=2")
    monkeypatch.setattr(train_sft, "check_record", lambda *_: None)
    folder = tmp_path / "made"
    folder.mkdir()
    train_sft.run_stage(run, folder)
    record = json.loads((folder / "training.json").read_text())
    assert record["steps"] == 1
    assert record["tokens_per_s"] > 0
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    for made in ("model", "adapter"):  # PEFT's own form is not left in the adapter
        assert is_ours(folder / made / CARD)
        assert f"SFT with the loss `{loss}`, 1 epochs, LoRA of rank 2" in (folder / made / CARD).read_text()
    (step,) = [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert step["event"] == "step"
    assert step["sft/star"] < 1
