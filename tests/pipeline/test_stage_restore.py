"""The stage restore, end to end on small weights, a scripted generator and scripted guards."""

import json
from pathlib import Path

import pytest
import yaml
from tests.pipeline.restoration.checkpoints import MATRICES, Three, close, load, low_rank
from tests.pipeline.test_stages import ANSWERS, COMPLIES, PROMPTS, REFUSES, Scripted

from ballast.errors import ConfigError
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.config_restore import LoxSweep, RestoreConfig
from ballast.pipeline.run import planned, run, stage_of, stage_settings
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
    assert [label for label, _ in candidates(twice)] == ["lox-1", "lox-2-1", "lox-2-2"]
    assert [method.rank for _, method in candidates(twice)] == [6, 1, 1]


def test_the_stage_is_a_part_of_a_run_where_it_is_enabled():
    assert "restore" not in planned(load_config("demo", []))
    enabled = load_config("demo", ["restore.enabled=true"])
    assert planned(enabled) == ["baseline", "align", "train", "evaluate", "restore", "report"]


def test_without_an_alignment_there_is_nothing_to_restore(context):
    from ballast.pipeline.stages.restore import _models

    context.config = load_config("demo", ["align.enabled=false"])
    with pytest.raises(ConfigError, match=r"restore\.base"):
        _models(context)


@pytest.mark.parametrize(
    "key",
    [
        "restore.aligned=x",
        "restore.keep_gain=1.5",
        'restore.methods=[{"type": "lox", "alpha": [0]}]',
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
