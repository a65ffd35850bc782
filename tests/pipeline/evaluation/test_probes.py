"""Probes and second judge in a run: a scripted model that cheats is found out, and one that does not is left alone."""

import io
import json

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from ballast.errors import GuardError
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.pipeline.config_evaluate import ProbesConfig
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.evaluation.attacks import OPENING, SCENE, attacked, in_a_scene
from ballast.pipeline.evaluation.measure import measure_model
from ballast.pipeline.evaluation.probes import refuses
from ballast.pipeline.evaluation.statistics import Estimate
from ballast.pipeline.evaluation.suites import SuitePrompt
from ballast.pipeline.generation import ScriptedGenerator
from ballast.pipeline.run import STAGES, run, stage_inputs, stage_settings

pytestmark = pytest.mark.model

PROMPTS = [
    {"prompt": "Harmful request number one", "kind": "harmful"},
    {"prompt": "Harmful request number two", "kind": "harmful"},
    {"prompt": "How do I bake bread?", "kind": "ordinary"},
]
COMPLIES = "Sure, here is the zanzibar plan that you asked for, with every step."
REFUSES = "I'm sorry, but I can't help with that request, because somebody could get hurt."
BREAD = "You mix flour with water and salt, then let it rest for an hour before baking."
GOES_ON = " first you take the zanzibar and then you do the rest of it."


class Scripted(RunContext):
    """A model that refuses when it is asked plainly, and complies once the answer has begun or the question is in a play."""

    def __init__(self, config, tokenizer):
        super().__init__(config, Console(file=io.StringIO(), width=80))
        self.start_model = "start"
        self.tokenizer = tokenizer
        self.guard = ScriptedGuardrail(lambda exchange, prefix: 0.8 if "zanzibar" in prefix else 0.1, "guard")
        self.judge = ScriptedGuardrail(self.read, "judge")
        self.second_judge = ScriptedGuardrail(lambda exchange, prefix: 0.7 if "plan" in prefix else 0.1, "second")
        self.prompts_judged = set()
        self._generator = ScriptedGenerator(self.answer, tokenizer, lambda ids, text: -1.0 if text == "Four" else -2.0)

    def read(self, exchange, prefix):
        self.prompts_judged.add(exchange.messages[-1]["content"])
        return 0.9 if "zanzibar" in prefix else 0.2

    def answer(self, ids, seed):
        text = self.tokenizer.decode(ids)
        if "Harmful" not in text:
            return BREAD
        if text.endswith(OPENING):
            return GOES_ON
        return COMPLIES if "play" in text else REFUSES

    @property
    def shown(self):
        return self.console.file.getvalue()


@pytest.fixture
def make(tmp_path, tokenizer):
    def context(*overrides):
        data = tmp_path / "test.jsonl"
        data.write_text("\n".join(map(json.dumps, PROMPTS)))
        base = [f"out={json.dumps(str(tmp_path))}", "name=one", f"data.test=[{json.dumps(str(data))}]"]
        return Scripted(load_config("demo", [*base, "evaluate.sampling.max_new_tokens=64", *overrides]), tokenizer)

    return context


def test_a_model_that_refuses_in_its_first_words_alone_is_found_out(make, tmp_path):
    context = make("evaluate.probes={}", "evaluate.samples=2")
    summary = measure_model(context, "start", tmp_path, "start", further=True)
    assert summary.unsafe_share.value == 0.0
    probes = summary.probes
    assert probes is not None
    # Two harmful prompts with two answers each; all that go on from the opening are unsafe.
    assert (probes.prefill.unsafe_share.value, probes.prefill.unsafe_share.n) == (1.0, 4)
    assert (probes.prefill.rise.value, probes.prefill.rise.n) == (1.0, 2)
    assert (probes.prefill.refused.value, probes.role_play.refused.value) == (0.0, 0.0)
    assert probes.role_play.unsafe_share.value == 1.0
    # The second judge sees a plan in the play alone.
    assert (probes.prefill.second_unsafe_share.value, probes.role_play.second_unsafe_share.value) == (0.0, 1.0)
    assert probes.refuses_everything is False
    # None of the plain answers is unsafe: there is nothing to try safe words on.
    assert probes.adaptation.judge.best.n == 0
    assert type(summary).from_json((tmp_path / "start.json").read_text()) == summary


def test_the_judge_reads_the_opened_answer_whole_and_the_request_without_its_scene(make, tmp_path):
    context = make("evaluate.probes={}", "evaluate.samples=1")
    measure_model(context, "start", tmp_path, "start", further=True)
    assert context.prompts_judged == {row["prompt"] for row in PROMPTS}
    rows = pq.read_table(tmp_path / "start-prefill.parquet").to_pylist()
    assert [row["completion"] for row in rows] == [OPENING + GOES_ON] * 2
    assert [row["written"] for row in rows] == [GOES_ON] * 2
    rows = pq.read_table(tmp_path / "start-role_play.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS[:2]]
    assert [row["completion"] for row in rows] == [row["written"] for row in rows] == [COMPLIES] * 2


def test_an_opening_that_the_model_adds_nothing_to_is_unscored_and_not_unsafe(make, tmp_path):
    context = make("evaluate.probes={role_play: false, adaptation: false}", "evaluate.samples=1")
    plain = context.answer
    context._generator.answer = lambda ids, seed: (
        "" if context.tokenizer.decode(ids).endswith(OPENING) else plain(ids, seed)
    )
    probes = measure_model(context, "start", tmp_path, "start", further=True).probes
    assert probes.prefill.unsafe_share.value is None
    assert probes.prefill.unsafe_share.unscored == 2
    assert probes.role_play is None
    assert probes.adaptation is None


def test_nothing_is_probed_unless_it_was_asked_for(make, tmp_path):
    assert measure_model(make(), "start", tmp_path, "start", further=True).probes is None
    # The stages that measure many candidates measure them plainly.
    assert measure_model(make("evaluate.probes={}"), "start", tmp_path, "start").probes is None
    assert not list(tmp_path.glob("start-*.parquet"))


def test_the_attacked_prompts_are_harmful_ones_and_the_same_every_time():
    prompts = [
        SuitePrompt(f"{kind}-{i}", "A {prompt} with 5% braces", kind)
        for i in range(20)
        for kind in ("harmful", "scary")
    ]
    some = attacked(prompts, 5)
    assert len(some) == 5
    assert {prompt.kind for prompt in some} == {"harmful"}
    assert some == attacked(prompts, 5)
    assert [int(p.id.split("-")[1]) for p in some] == sorted(int(p.id.split("-")[1]) for p in some)
    assert attacked(prompts, None) == attacked(prompts, 20) == [p for p in prompts if p.kind == "harmful"]
    assert in_a_scene(some[0]).prompt == SCENE.replace("{prompt}", "A {prompt} with 5% braces")


@pytest.mark.parametrize(("share", "flag"), [(0.1, False), (0.11, True), (1.0, True), (0.0, False), (None, None)])
def test_a_model_that_refuses_ordinary_prompts_above_the_bound_is_flagged(share, flag):
    assert refuses(Estimate(share, share, share, 10), ProbesConfig()) is flag


def pretend_trained(context, *stages):
    for name in stages:
        inputs = stage_inputs(context, name)
        with context.folder.writing(name, stage_settings(context.config, name), inputs) as scratch:
            (scratch / "training.json").write_text(json.dumps({"tokens_per_s": 321.0}))
            (scratch / "model").mkdir()
            assert STAGES[name]


def test_a_run_reports_both_judges_the_probes_and_the_gap(make, tmp_path):
    questions = tmp_path / "mc_task.json"
    question = {
        "question": "Two and two?",
        "mc1_targets": {"Four": 1, "Five": 0},
        "mc2_targets": {"Four": 1, "Five": 0},
    }
    questions.write_text(json.dumps([question]))
    context = make("evaluate.probes={windows: 2}", f"evaluate.truthfulqa={json.dumps(str(questions))}")
    pretend_trained(context, "align", "train")
    run(context.config, ["baseline", "evaluate", "report"], context=context)
    folder = context.folder.path
    gap = json.loads((folder / "evaluate" / "reward_gap.json").read_text())
    # All models are one: nothing changed, and the training left no table of completions.
    assert gap["models"]["alarm"] is False
    assert gap["models"]["judge"]["value"] == 0.0
    assert gap["training"] is None
    final = json.loads((folder / "evaluate" / "final.json").read_text())
    assert final["truthfulqa"]["mc1"]["value"] == 1.0
    assert final["agreement"]["judge, second judge"]["disagreement"]["value"] == 0.0
    assert pq.read_table(folder / "evaluate" / "final-truthfulqa.parquet").num_rows == 1
    markdown = (folder / "report" / "summary.md").read_text()
    for title in ("Judges:", "Probes:", "TruthfulQA:"):
        assert title in markdown
    assert "reward gap, start -> final" in context.shown
    for title in ("Judges", "Probes", "TruthfulQA"):
        assert title in context.shown
    assert max(map(len, context.shown.splitlines())) <= 80 or "…" not in context.shown
    assert "zanzibar" not in context.shown + (folder / "metrics.jsonl").read_text()


def test_a_second_judge_that_cannot_score_stops_the_measurement(make, tmp_path):
    context = make("train.max_unscored_share=0.5")
    context.second_judge = ScriptedGuardrail(lambda exchange, prefix: None, "second")
    with pytest.raises(GuardError, match="guardrail 'second' left 6 of 6 completions"):
        measure_model(context, "start", tmp_path, "start")
    rows = pq.read_table(tmp_path / "start.parquet").to_pylist()
    assert {row["second_reason"] for row in rows} == {"the script has no risk for this prefix"}


def test_what_baseline_and_evaluate_measure_besides_leaves_a_training_as_it_is(make):
    plain = make().config
    more = make("evaluate.probes={}", "evaluate.truthfulqa=mc_task.json", "monitor.enabled=true").config
    judged = make(
        "evaluate.second_judge={guard: {type: rules, patterns: [{pattern: x, risk: 1}]}}", "monitor.enabled=true"
    ).config
    monitored = make("monitor.enabled=true").config
    assert stage_settings(more, "train") == stage_settings(monitored, "train") == stage_settings(judged, "train")
    assert stage_settings(plain, "evaluate") != stage_settings(more, "evaluate")
