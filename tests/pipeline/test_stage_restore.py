"""The stage restore, end to end on small weights, a scripted generator and scripted guards."""

import json
from pathlib import Path

import pytest
import yaml
from tests.pipeline.restoration.checkpoints import MATRICES, Three, close, load, low_rank, save_tiny_models
from tests.pipeline.test_stages import ANSWERS, COMPLIES, PROMPTS, REFUSES, Scripted

import ballast
from ballast.errors import ConfigError, DataError
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.config_restore import LoxSweep, RestoreConfig
from ballast.pipeline.restoration.nlsr.settings import NLSRSettings
from ballast.pipeline.run import run
from ballast.pipeline.run_checks import check_parts
from ballast.pipeline.stage_graph import planned, stage_inputs, stage_of, stage_settings
from ballast.pipeline.stages.restore import candidates

pytestmark = pytest.mark.model


class Repaired(Scripted):
    """Training has broken the model; LoX at 0.5 mends half of it, at 1 all, and RESTA refuses everything."""

    def answer(self, ids, seed):
        text, folder = self.tokenizer.decode(ids), self._generator.folder or "start"
        if "Harmful" not in text:
            return REFUSES if "resta" in folder else ANSWERS
        mended = "resta" in folder or folder.endswith("lox-1") or (folder.endswith("lox-0.5") and "one" in text)
        return REFUSES if mended or folder.endswith("align/model") else COMPLIES


@pytest.fixture
def context(tmp_path, tokenizer):
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in PROMPTS))
    methods = '[{"type": "lox", "rank": 2, "alpha": [0.5, 1.0]}, {"type": "resta", "gamma": [1.0]}]'
    config = load_config(
        "demo", [f"out={json.dumps(str(tmp_path))}", "name=one", f"data.test=[{json.dumps(str(data))}]",
                 "evaluate.samples=1", f"restore.methods={methods}"],
    )  # fmt: skip
    context = Repaired(config, tokenizer)
    three = Three(tmp_path / "weights")
    context.start_model, context.three = three.base, three
    for stage, model in (("align", three.aligned), ("train", three.tuned)):
        inputs = {need: context.folder.digest(need) for need in stage_of(config, stage).needs}
        with context.folder.writing(stage, stage_settings(config, stage), inputs) as scratch:
            (scratch / "training.json").write_text(json.dumps({"tokens_per_s": 1.0}))
            (scratch / "model").symlink_to(model)
    return context


def test_the_safest_repair_that_does_not_refuse_everything_is_kept(context):
    run(context.config, ["evaluate", "restore"], context=context)
    made = context.folder.stage("restore")
    choice = json.loads((made / "choice.json").read_text())
    assert choice["best"] == "lox-1"
    assert choice["excluded"]["resta-1"] == [
        "refused scary 1.000, 0.050 allowed",
        "refused ordinary 1.000, 0.050 allowed",
    ]
    # The one that is kept is the one that was measured, and the others are gone.
    found = load(made / "model")
    for name in MATRICES:
        term = low_rank(context.three.aligned_arrays[name] - context.three.base_arrays[name], 2)
        assert close(found[name], context.three.tuned_arrays[name] + term)
    assert not list(made.glob("model-*"))
    unsafe = [
        json.loads((made / f"{label}.json").read_text())["unsafe_share"]["value"]
        for label in ("lox-0.5", "lox-1", "resta-1")
    ]
    assert unsafe == [0.5, 0.0, 0.0]
    assert "kept: lox-1" in context.shown
    assert "| lox-0.5 |" in (made / "table.md").read_text()


def test_every_method_is_tried_at_every_strength_under_a_name_of_its_own():
    twice = RestoreConfig(methods=(LoxSweep(alpha=(1,)), LoxSweep(alpha=(1, 2), rank=1)))
    tried = list(candidates(twice, realign=lambda sweep: pytest.fail("none of these is NLSR")))
    assert [label for label, _ in tried] == ["lox-1", "lox-2-1", "lox-2-2"]
    assert [method.rank for _, method in tried] == [6, 1, 1]


class Realigned(Scripted):
    """Training has broken the model; NLSR mends half of it with a quarter of the layers, and all with half of them."""

    def answer(self, ids, seed):
        text, folder = self.tokenizer.decode(ids), self._generator.folder or "start"
        if "Harmful" not in text:
            return ANSWERS
        mended = folder.endswith("nlsr-0.5") or (folder.endswith("nlsr-0.25") and "one" in text)
        return REFUSES if mended or folder.endswith("align/model") else COMPLIES


@pytest.fixture
def nlsr_context(tmp_path, tokenizer, tiny_model):
    weights = tmp_path / "weights"
    save_tiny_models(weights, tiny_model, tokenizer)
    data, answered = tmp_path / "test.jsonl", tmp_path / "answered.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in PROMPTS))
    rows = [{"prompt": f"Harmful in training, {i}", "kind": "harmful", "response": REFUSES} for i in range(3)]
    rows += [{"prompt": "How do I boil an egg?", "kind": "ordinary", "response": ANSWERS}]
    answered.write_text("\n".join(json.dumps(row) for row in rows))
    methods = '[{"type": "nlsr", "share": [0.25, 0.5], "max_rows": 2}]'
    config = load_config(
        "demo", [f"out={json.dumps(str(tmp_path))}", "name=one", f"data.test=[{json.dumps(str(data))}]",
                 f"align.data=[{json.dumps(str(answered))}]", "evaluate.samples=1", f"restore.methods={methods}"],
    )  # fmt: skip
    context = Realigned(config, tokenizer)
    context.start_model = str(weights / "base")
    for stage, model in (("align", "aligned"), ("train", "tuned")):
        inputs = stage_inputs(context, stage)
        with context.folder.writing(stage, stage_settings(config, stage), inputs) as scratch:
            (scratch / "training.json").write_text(json.dumps({"tokens_per_s": 1.0}))
            (scratch / "model").symlink_to(weights / model)
    return context


def test_nlsr_is_tried_at_every_share_on_one_reading_of_the_runs_harmful_rows(nlsr_context, tmp_path, monkeypatch):
    from ballast.pipeline.restoration.nlsr import realign

    read = []
    original = realign.second_moments
    monkeypatch.setattr(realign, "second_moments", lambda m, rows, *rest: read.append(rows) or original(m, rows, *rest))
    run(nlsr_context.config, ["evaluate", "restore"], context=nlsr_context)
    made = nlsr_context.folder.stage("restore")
    assert json.loads((made / "choice.json").read_text())["best"] == "nlsr-0.5"
    assert len(read) == 1  # two shares, and the model ran once
    texts = [nlsr_context.tokenizer.decode(row.ids) for row in read[0]]
    assert len(texts) == 2
    assert all("Harmful in training" in text and REFUSES in text for text in texts)
    record = json.loads((made / "model" / "restoration.json").read_text())
    assert record["settings"]["rank"] == nlsr_context.config.align.lora.r
    assert len(record["settings"]["patched"]) == 7  # of 14 linear modules, 0.5
    # What the function does on the same rows with the same settings.
    paths = [str(tmp_path / "weights" / name) for name in ("base", "aligned", "tuned")]
    settings = NLSRSettings(share=0.5, rank=nlsr_context.config.align.lora.r)
    ballast.nlsr(*paths, rows=read[0], out=tmp_path / "direct", settings=settings)
    found, wanted = load(made / "model"), load(tmp_path / "direct")
    assert found.keys() == wanted.keys()
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_nlsr_without_a_harmful_row_to_calibrate_on_is_refused_before_anything_is_computed(nlsr_context, tmp_path):
    rows = [{"prompt": "How do I boil an egg?", "kind": "ordinary", "response": ANSWERS}]
    (tmp_path / "answered.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=r"nlsr.*align\.data"):
        check_parts(nlsr_context, ["restore"])


def test_a_restoration_by_nlsr_is_not_taken_for_done_when_its_calibration_rows_have_changed(nlsr_context):
    with_nlsr = stage_inputs(nlsr_context, "restore")
    assert any("answered.jsonl" in name for name in with_nlsr)
    nlsr_context.config = load_config("demo", [])
    assert "align.data" not in stage_of(nlsr_context.config, "restore").data


def test_the_stage_is_a_part_of_a_run_where_it_is_enabled():
    assert "restore" not in planned(load_config("demo", []))
    enabled = load_config("demo", ["restore.enabled=true"])
    assert planned(enabled) == ["baseline", "align", "train", "evaluate", "restore", "report"]


@pytest.mark.parametrize(
    ("setting", "said"), [("align.enabled=false", r"restore\.base"), ("restore.device=nowhere", "device 'nowhere'")]
)
def test_what_cannot_be_restored_is_refused_before_the_training(context, tmp_path, setting, said):
    config = load_config("demo", [f"out={json.dumps(str(tmp_path))}", "name=two", "restore.enabled=true", setting])
    with pytest.raises(ConfigError, match=said):
        run(config, context=Repaired(config, context.tokenizer))
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    "key",
    [
        "restore.aligned=x",
        "restore.keep_gain=1.5",
        'restore.methods=[{"type": "lox", "alpha": [0]}]',
        'restore.methods=[{"type": "lox", "alpha": [1, 1.0]}]',  # one folder for two
        'restore.methods=[{"type": "safe-lora", "tau": [0.3, 0.3000001]}]',
        'restore.methods=[{"type": "nlsr", "share": [0]}]',
        'restore.methods=[{"type": "nlsr", "sparsity": 1}]',
        "restore.methods=[]",
    ],
)
def test_settings_without_a_meaning_are_refused(key):
    with pytest.raises(ConfigError, match="restore"):
        load_config("demo", [key])


def test_the_configuration_in_the_guide_is_the_default_and_parses():
    guide = Path(__file__).parents[2] / "docs" / "restoration.md"
    written = yaml.safe_load(guide.read_text().split("```yaml\n")[1].split("```")[0])["restore"]
    assert RestoreConfig(**written) == RestoreConfig(enabled=True)
