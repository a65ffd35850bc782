"""The stage graph: what is run, what is kept, and what is refused before anything is run."""

import io
import json
import os
import sys
import types

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ballast.errors import ConfigError, DataError, EngineError, ModelError
from ballast.pipeline import cli
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.run import run
from ballast.pipeline.stage_graph import STAGES
from ballast.pipeline.template_contract import TemplateContract

ORDER = [name for name, stage in STAGES.items() if stage.in_run]


def prompt_format(template="template"):
    """Stands in for a tokenizer's prompt format: its contract alone."""
    contract = TemplateContract(template, {}, {}, "", None, None, {}, "consistent", None, {})
    return types.SimpleNamespace(contract=lambda: contract, decode=str)


class Stages:
    """Stands in for the modules of all stages: counts calls, and fails where it is told to."""

    def __init__(self):
        self.calls = []
        self.fails = {}

    def module(self, name):
        def run_stage(context, folder):
            self.calls.append(name)
            (folder / "out.txt").write_text(f"{name}, call {len(self.calls)}")
            if name in self.fails:
                raise self.fails[name]

        return types.SimpleNamespace(run_stage=run_stage)


@pytest.fixture
def stages(monkeypatch):
    fakes = Stages()
    for name in STAGES:
        monkeypatch.setitem(sys.modules, f"ballast.pipeline.stages.{name}", fakes.module(name))
    return fakes


@pytest.fixture
def configured(tmp_path):
    def build(*overrides):
        return load_config("demo", [f"out={json.dumps(str(tmp_path))}", "name=one", *overrides])

    return build


@pytest.fixture(autouse=True)
def formats(monkeypatch):
    monkeypatch.setattr(RunContext, "prompt_format", prompt_format())


def test_a_stage_does_not_follow_one_of_another_template(stages, configured, monkeypatch):
    go(configured(), ["align"])
    monkeypatch.setattr(RunContext, "prompt_format", prompt_format("templete"))
    with pytest.raises(ModelError, match=r"(?s)align' was made under another prompt format.*U\+0061 .*U\+0065 here"):
        go(configured(), ["train"])
    assert stages.calls == ["align"]


def test_a_training_does_not_go_on_under_another_template(stages, configured, monkeypatch, tmp_path):
    stages.fails["align"] = EngineError("killed")
    with pytest.raises(EngineError):
        go(configured(), ["align"])
    (tmp_path / "one" / "align.partial" / "checkpoints").mkdir()
    monkeypatch.setattr(RunContext, "prompt_format", prompt_format("templete"))
    with pytest.raises(ModelError, match=r"align\.partial' was made under another prompt format"):
        go(configured(), ["align"], resume=True)
    assert stages.calls == ["align"]


def go(config, stages=None, resume=False):
    """A run whose terminal is kept; gives what was shown."""
    context = RunContext(config, Console(file=io.StringIO(), width=200))
    run(config, stages, resume, context)
    return context.console.file.getvalue()


def test_a_run_does_every_stage_in_order(stages, configured):
    go(configured())
    assert stages.calls == ORDER == ["baseline", "align", "train", "evaluate", "report"]


def test_a_finished_stage_is_not_done_again(stages, configured, tmp_path):
    go(configured())
    before = (tmp_path / "one" / "train" / "record.json").read_bytes()
    shown = go(configured())
    # The report is instant, and is made again so that its tables are seen.
    assert stages.calls == [*ORDER, "report"]
    assert shown.splitlines()[:5] == [*(f"{name}: done before, kept" for name in ORDER[:-1]), "report"]
    assert (tmp_path / "one" / "train" / "record.json").read_bytes() == before


def test_checkpoints_that_a_kill_left_in_a_finished_stage_go_with_the_next_call(stages, configured, tmp_path):
    go(configured())
    made = tmp_path / "one" / "train"
    (made / "checkpoints" / "step-00000002").mkdir(parents=True)
    (made / "begun.json").write_text("{}")
    go(configured(), resume=True)
    assert sorted(path.name for path in made.iterdir()) == ["out.txt", "prompt_format.json", "record.json"]


def test_one_stage_alone_runs_alone(stages, configured):
    go(configured(), ["baseline"])
    assert stages.calls == ["baseline"]


def test_every_stage_records_what_it_depends_on(stages, configured, tmp_path):
    go(configured())
    for name in ORDER:
        record = json.loads((tmp_path / "one" / name / "record.json").read_text())
        assert set(record["settings"]) == set(STAGES[name].reads)
        assert set(record["inputs"]) == set(STAGES[name].needs)
    assert load_config(str(tmp_path / "one" / "config.yaml"), []) == configured()


def test_a_failed_stage_is_not_done_and_needs_resume(stages, configured, tmp_path):
    stages.fails["train"] = EngineError("planted")
    with pytest.raises(EngineError):
        go(configured())
    assert stages.calls == ["baseline", "align", "train"]
    assert not (tmp_path / "one" / "train").exists()
    del stages.fails["train"]
    with pytest.raises(ConfigError, match="holds an unfinished stage 'train'; add --resume"):
        go(configured())
    assert len(stages.calls) == 3
    go(configured(), resume=True)
    assert stages.calls[3:] == ["train", "evaluate", "report"]


def test_every_line_of_metrics_is_json_after_a_failure_too(stages, configured, tmp_path):
    stages.fails["align"] = ValueError("planted")
    with pytest.raises(ValueError, match="planted"):
        go(configured())
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line["stage"]) for line in lines] == [
        ("stage_started", "baseline"),
        ("stage_finished", "baseline"),
        ("stage_started", "align"),
        ("stage_failed", "align"),
    ]


def test_a_changed_configuration_is_refused_by_the_keys_that_a_stage_reads(stages, configured):
    go(configured())
    # The baseline does not depend on train.steps: it is kept, and the refusal comes from `train`.
    with pytest.raises(ConfigError, match=r"holds stage 'train' from another configuration \(train\.steps was"):
        go(configured("train.steps=7"))
    with pytest.raises(ConfigError, match=r"holds stage 'baseline' .*\(seed was 0, is 9\)"):
        go(configured("seed=9"))
    assert stages.calls == ORDER


def test_a_stage_is_refused_where_what_it_needs_was_made_with_another_configuration(stages, configured):
    go(configured())
    changed = "align.epochs=5"
    for name in ("train", "evaluate", "report", "rollout"):
        with pytest.raises(ConfigError, match=r"holds stage 'align' .*align\.epochs was [0-9.]+, is 5\.0"):
            go(configured(changed), [name])
    # `score` needs `rollout`, which needs `align`; the baseline needs neither.
    go(configured(), ["rollout", "score"])
    with pytest.raises(ConfigError, match="holds stage 'align'"):
        go(configured(changed), ["score"])
    go(configured(changed), ["baseline"])
    assert stages.calls == [*ORDER, "rollout", "score"]


def test_all_finished_stages_are_checked_before_the_first_one_runs(stages, configured, tmp_path):
    go(configured(), ["align"])
    written = (tmp_path / "one" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="holds stage 'align'"):
        go(configured("align.epochs=5"))  # whose first stage is the baseline, minutes long
    assert stages.calls == ["align"]
    assert (tmp_path / "one" / "config.yaml").read_text() == written


def test_the_measurements_depend_on_how_segment_scores_are_cleaned(stages, configured):
    go(configured(), ["baseline"])
    with pytest.raises(ConfigError, match=r"'baseline' .*shaping\.clean_trace was True, is False"):
        go(configured("shaping.clean_trace=false"), ["baseline"])


def test_an_edited_data_file_is_refused_by_the_stages_that_read_it(stages, configured, tmp_path):
    train, test, answers = (tmp_path / f"{name}.jsonl" for name in ("train", "test", "answers"))
    for file in (train, test, answers):
        file.write_text("{}")
    config = configured(f"data.train={train}", f"data.test={test}", f"align.data={answers}")
    go(config)
    for file, reader in ((train, "train"), (test, "baseline"), (answers, "align")):
        before = file.read_text()
        file.write_text("{} ")
        with pytest.raises(ConfigError, match=rf"data file '.*{file.name}' has changed since stage '{reader}'"):
            go(config)
        file.write_text(before)
    assert stages.calls == ORDER
    train.write_text("edited")
    go(config, ["baseline", "align"])  # they do not read it
    with pytest.raises(ConfigError, match=r"train\.jsonl' has changed since stage 'train'"):
        go(config, ["report"])


def test_names_that_do_not_exist_are_refused_before_anything_runs(stages, configured, tmp_path):
    for key in ("guard", "judge"):
        with pytest.raises(ConfigError, match="guardrail 'absent': no such guard"):
            go(configured(f"{key}={{type: plugin, name: absent}}"))
    for judge in ("judge={type: plugin, name: absent}", "monitor.judge={type: plugin, name: absent}"):
        # A training that is monitored has a judge, whichever other stages run.
        with pytest.raises(ConfigError, match="guardrail 'absent': no such guard"):
            go(configured("monitor.enabled=true", "align.enabled=false", judge), ["train"])
    absent = "train.reward_functions=no_such_package:function"
    with pytest.raises(ConfigError, match="'no_such_package:function' cannot be imported"):
        go(configured(absent))
    assert stages.calls == []
    assert not (tmp_path / "one").exists()
    go(configured(absent), ["baseline", "align"])  # neither needs it
    assert stages.calls == ["baseline", "align"]


def test_what_the_user_can_mend_needs_no_resume(stages, configured):
    stages.fails["train"] = DataError("planted")
    with pytest.raises(DataError):
        go(configured())
    stages.fails.clear()
    go(configured())
    assert stages.calls == ["baseline", "align", "train", "train", "evaluate", "report"]


def test_a_stage_whose_input_was_made_again_is_refused(stages, configured, tmp_path):
    go(configured())
    for name in ("align", "train"):
        for file in (tmp_path / "one" / name).iterdir():
            file.unlink()
        (tmp_path / "one" / name).rmdir()
    go(configured(), ["align", "train"])
    with pytest.raises(ConfigError, match="stage 'align' was run again after 'evaluate'"):
        go(configured())


def test_a_stage_whose_input_is_missing_names_the_command(stages, configured):
    with pytest.raises(DataError, match=r"stage 'train' needs stage 'align'.*run `ballast align CONFIG` first"):
        go(configured(), ["train"])
    assert stages.calls == []


def test_align_is_skipped_where_it_is_switched_off_and_refused_where_it_is_asked_for(stages, configured, tmp_path):
    config = configured("align.enabled=false")
    with pytest.raises(ConfigError, match=r"switched off .*align\.enabled=true"):
        go(config, ["align"])
    go(config)
    assert stages.calls == ["baseline", "train", "evaluate", "report"]
    assert set(json.loads((tmp_path / "one" / "train" / "record.json").read_text())["inputs"]) == set()


def test_an_unknown_stage_is_refused_with_those_there_are(stages, configured):
    with pytest.raises(ConfigError, match="no stage 'trian'; there are baseline, align"):
        run(configured(), ["trian"])


def test_a_run_folder_that_is_a_file_or_cannot_be_written_is_refused(stages, configured, tmp_path):
    (tmp_path / "one").write_text("I am a file")
    with pytest.raises(ConfigError, match="is a file; choose another name= or out="):
        go(configured())
    with pytest.raises(ConfigError, match="cannot be written"):
        go(configured("name=below", f"out={json.dumps(str(tmp_path / 'one'))}"))
    assert stages.calls == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(stages, configured, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match=r"cannot be written .Permission denied.; choose another out="):
            go(configured())
    finally:
        tmp_path.chmod(0o700)


def test_a_context_of_its_own_is_closed_after_a_failure(stages, configured, monkeypatch):
    closed = []
    monkeypatch.setattr(RunContext, "close", lambda self: closed.append(self))
    stages.fails["baseline"] = ValueError("planted")
    with pytest.raises(ValueError, match="planted"):
        run(configured())
    assert len(closed) == 1


# ------------------------------------------------------------------- the same through the command line


def invoke(tmp_path, *words):
    return CliRunner().invoke(cli.app, [*words, f"out={json.dumps(str(tmp_path))}", "name=one"])


def test_the_command_exits_with_2_for_what_the_user_can_mend(stages, tmp_path):
    assert invoke(tmp_path, "run", "demo").exit_code == 0
    for words in (("run", "demo", "seed=9"), ("run", "absent"), ("run", "demo", "--stage", "nonsense")):
        result = invoke(tmp_path, *words)
        assert (result.exit_code, "Traceback" in result.stderr) == (2, False), words
    alone = CliRunner().invoke(cli.app, ["train", "demo", f"out={json.dumps(str(tmp_path))}", "name=two"])
    assert alone.exit_code == 2
    assert "run `ballast align CONFIG` first" in " ".join(alone.stderr.split())


def test_the_command_exits_with_1_for_a_failure_and_resumes(stages, tmp_path):
    stages.fails["train"] = EngineError("vLLM did not start")
    assert invoke(tmp_path, "run", "demo").exit_code == 1
    stages.fails.clear()
    assert invoke(tmp_path, "run", "demo").exit_code == 2
    assert invoke(tmp_path, "run", "demo", "--resume").exit_code == 0


def test_an_interrupted_command_exits_with_130_and_goes_on_with_resume(stages, tmp_path):
    stages.fails["evaluate"] = KeyboardInterrupt()
    assert invoke(tmp_path, "run", "demo").exit_code == 130
    stages.fails.clear()
    assert invoke(tmp_path, "run", "demo", "--resume").exit_code == 0
    assert stages.calls[-3:] == ["evaluate", "evaluate", "report"]
