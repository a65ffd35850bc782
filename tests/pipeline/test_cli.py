"""The command line: what it hands on, how it fails, and how little it imports to say so."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import ballast
from ballast.errors import EngineError
from ballast.pipeline import cli, run

HEAVY = ("torch", "transformers", "trl", "vllm", "datasets", "scipy", "peft")


@pytest.fixture
def calls(monkeypatch):
    """Calls of `run`, which is replaced: the command line is tested, and not the run."""
    seen = []
    monkeypatch.setattr(
        run, "run", lambda config, stages=None, resume=False, live=True: seen.append((config, stages, resume, live))
    )
    return seen


@pytest.fixture
def failing(monkeypatch):
    """Make `run` raise the given exception."""

    def fail_with(error: BaseException) -> None:
        def fail(config, stages=None, resume=False, live=True):
            raise error

        monkeypatch.setattr(run, "run", fail)

    return fail_with


def invoke(*words: str):
    return CliRunner().invoke(cli.app, words)


def test_run_hands_on_the_configuration_with_its_overrides(calls):
    result = invoke("run", "demo", "train.steps=3", "--resume", "name=other")
    assert result.exit_code == 0, result.output
    ((config, stages, resume, live),) = calls
    assert (config.train.steps, config.name, stages, resume, live) == (3, "other", None, True, True)


@pytest.mark.parametrize("words", [["demo"], ["run", "demo"], ["train", "demo"], ["restore", "stage", "demo"]])
def test_every_command_that_trains_can_be_told_not_to_draw_a_table(calls, words):
    assert invoke(*words, "--no-live").exit_code == 0
    assert [live for *_, live in calls] == [False]


@pytest.mark.parametrize("stage", cli.STAGES)
def test_every_stage_is_a_command_and_an_option_of_run(calls, stage):
    assert invoke(stage, "demo").exit_code == 0
    assert invoke("run", "demo", "--stage", stage).exit_code == 0
    assert [stages for _, stages, *_ in calls] == [[stage], [stage]]


def test_the_commands_are_the_stages_of_the_graph_in_their_order():
    assert list(cli.STAGES) == list(run.STAGES)


def test_a_dry_run_names_the_stages_that_would_run():
    assert invoke("demo", "--dry-run").stdout.splitlines()[0].endswith("stages: baseline align train evaluate report")
    without = invoke("demo", "align.enabled=false", "--dry-run").stdout.splitlines()[0]
    assert without.endswith("stages: baseline train evaluate report")
    assert invoke("train", "demo", "--dry-run").stdout.splitlines()[0].endswith("stages: train")


def test_demo_runs_the_shipped_demo_with_overrides(calls):
    assert invoke("demo", "seed=3").exit_code == 0
    ((config, stages, *_),) = calls
    assert (config.name, config.seed, stages) == ("demo", 3, None)


def test_a_dry_run_prints_a_file_that_runs_the_same_and_runs_nothing(calls, tmp_path):
    printed = invoke("run", "demo", "seed=3", "--dry-run").stdout
    copy = tmp_path / "copy.yaml"
    copy.write_text(printed)
    assert calls == []
    assert invoke("run", str(copy)).exit_code == 0
    assert calls[0][0].seed == 3


def test_a_bad_configuration_exits_with_2_and_no_traceback():
    result = invoke("run", "demo", "train.stepps=3")
    assert result.exit_code == 2
    assert "did you mean train.steps?" in result.stderr
    assert "Traceback" not in result.output


def test_an_unknown_stage_exits_with_2_and_names_the_stages():
    result = invoke("run", "demo", "--stage", "trian")
    assert result.exit_code == 2
    assert "evaluate" in result.stderr


def test_a_ballast_error_exits_with_1_without_traceback(failing):
    failing(EngineError("vLLM did not start [because]; free some memory"))
    result = invoke("run", "demo")
    assert result.exit_code == 1
    assert "vLLM did not start [because]; free some memory" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_traceback_is_shown_when_it_is_asked_for(failing, monkeypatch):
    monkeypatch.setenv("BALLAST_TRACEBACK", "1")
    failing(EngineError("vLLM did not start"))
    result = invoke("run", "demo")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr


def test_an_unexpected_error_keeps_its_plain_traceback():
    code = (
        "import sys; from ballast.pipeline import cli, run; run.run = lambda *_, **__: {}['a fault of the program'];"
        "sys.argv = ['ballast', 'demo']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    # Python's own form: boxes would show local variables' values, and with them text of prompts.
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("KeyError: 'a fault of the program'\n")


def test_an_interrupt_exits_with_130_and_one_line(failing):
    failing(KeyboardInterrupt())
    result = invoke("run", "demo")
    assert result.exit_code == 130
    assert len(result.stderr.splitlines()) == 1


def test_version_is_printed_alone():
    assert invoke("--version").stdout == f"ballast {ballast.__version__}\n"


def imported_by(*words: str) -> tuple[int, set[str]]:
    """Exit code of a fresh process, and every module that it imported."""
    command = [sys.executable, "-X", "importtime", "-m", "ballast.pipeline.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done.returncode, {line.rsplit("|", 1)[-1].strip() for line in lines}


@pytest.mark.parametrize(
    ("words", "code"), [(("run", "demo", "train.stepps=3"), 2), (("run", "absent"), 2), (("guard", "list"), 0)]
)
def test_mistakes_are_answered_before_anything_heavy_is_imported(words, code):
    exit_code, modules = imported_by(*words)
    assert exit_code == code
    assert "typer" in modules
    assert modules.isdisjoint(HEAVY)


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("--version",)])
def test_help_imports_not_even_the_configuration(words):
    exit_code, modules = imported_by(*words)
    assert exit_code == 0
    assert "typer" in modules
    assert modules.isdisjoint({*HEAVY, "ballast.pipeline.config", "numpy"})
