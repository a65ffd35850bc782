"""Launch files, and which runs they can carry."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ballast.errors import ConfigError
from ballast.pipeline import launch_run, launching
from ballast.pipeline.cli import app
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.launching import (
    Launch,
    check_launch,
    launch_files,
    launch_of_environment,
    micro_batch,
    read_launch,
)
from ballast.pipeline.run import run

STAGES = ["baseline", "align", "train", "evaluate", "report"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_shipped_file_is_read_as_what_its_name_says(name):
    assert read_launch(name).kind == name
    assert read_launch(name).processes == 8
    assert read_launch(name, 3).processes == 3
    assert launch_files() == ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_every_shipped_file(name):
    from accelerate.commands import launch
    from accelerate.commands.config import load_config_from_file
    from accelerate.utils import DistributedType

    file = str(read_launch(name).path)
    known = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP}
    assert load_config_from_file(file).distributed_type == known.get(name, DistributedType.DEEPSPEED)
    parser = launch.launch_command_parser()
    args, _, _ = launch._validate_launch_command(
        parser.parse_args(["--config_file", file, "--num_processes", "2", "-m", "module"])
    )
    assert (args.num_processes, args.mixed_precision) == (2, "no")
    assert args.multi_gpu == (name == "ddp")
    if name == "fsdp2":
        assert int(args.fsdp_version) == 2
    if name.startswith("zero"):
        assert int(args.zero_stage) == int(name[-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no launch file can be read there"),
        ("a: [", "no launch file can be read there"),
        ("num_processes: 2", "no distributed_type"),
        ("distributed_type: MULTI_GPU", "num_processes = None"),
        ("{distributed_type: XLA, num_processes: 2}", "distributed_type = XLA is not known here"),
        ("{distributed_type: MULTI_GPU, num_processes: 2, num_machines: 2}", "num_machines = 2"),
    ],
)
def test_a_launch_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path, text, message):
    if text is not None:
        (tmp_path / "launch.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_launch(str(tmp_path / "launch.yaml"))


def test_a_step_that_the_processes_cannot_share_evenly_is_refused():
    config = load_config("grpo", ["train.prompts_per_step=3", "train.group_size=4", "train.micro_batch_size=4"])
    check_launch(config, ["train"], Launch("ddp", 2))
    with pytest.raises(ConfigError, match=r"train.prompts_per_step \* train.group_size = 12 .* among 8 processes"):
        check_launch(config, ["train"], Launch("ddp", 8))
    check_launch(config, ["evaluate"], Launch("ddp", 8))  # which does not train
    with pytest.raises(ConfigError, match="align"):
        check_launch(config, ["align"], Launch("ddp", config.align.batch_size + 1))


def test_a_guard_on_vllm_inside_the_processes_is_refused_by_its_key():
    vllm = "{type: llama_guard, model: some/model, engine: {type: vllm}}"
    with pytest.raises(ConfigError, match=r"guard\.engine\.type = vllm .*server"):
        check_launch(load_config("grpo", [f"guard={vllm}"]), ["train"], Launch("ddp", 2))
    measured = load_config("grpo", [f"judge={vllm}"])
    check_launch(measured, ["train"], Launch("ddp", 2))  # it is not asked in training
    with pytest.raises(ConfigError, match=r"judge\.engine\.type = vllm"):
        check_launch(load_config("grpo", [f"judge={vllm}", "monitor.enabled=true"]), ["train"], Launch("ddp", 2))


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2", "zero3"])
def test_sharded_parameters_are_refused_with_the_reason(kind):
    with pytest.raises(ConfigError, match=f"stage 'train' with a launch by {kind}: it shards the parameters"):
        check_launch(load_config("grpo", []), ["train"], Launch(kind, 2))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("safegrad.enabled=true", "its engine holds the gradients"),
        ("probing.enabled=true", "its engine holds the gradients"),
        ("regularization.l2_weight=0.1", "its engine holds the gradients"),
        ("monitor.enabled=true", "part of the optimizer's state"),
        ("train.checkpoint_every=5", "part of the optimizer's state"),
    ],
)
def test_what_zero_2_cannot_do_correctly_is_refused_by_its_key(override, reason):
    with pytest.raises(ConfigError, match=f"{override.split('=')[0]} = .* launch by zero2: .*{reason}.*--launch ddp"):
        check_launch(load_config("grpo", [override]), ["train"], Launch("zero2", 2))


def test_a_sharded_launch_without_a_gpu_is_refused_for_it_would_be_ddp(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="without a GPU"):
        check_launch(load_config("grpo", []), ["train"], Launch("zero2", 2))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="DeepSpeed is not installed"):
        check_launch(load_config("grpo", []), ["train"], Launch("zero2", 2))
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: object())
    check_launch(load_config("grpo", []), ["train"], Launch("zero2", 2))


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, "ddp"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3"),
    ],
)
def test_a_launched_process_knows_how_it_was_launched(monkeypatch, environment, kind):
    for name, value in {"WORLD_SIZE": "4", **environment}.items():
        monkeypatch.setenv(name, value)
    assert launch_of_environment() == Launch(kind, 4)


def test_a_stage_that_does_not_train_is_refused_in_several_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = load_config("grpo", [f'out="{tmp_path}"'])
    with pytest.raises(ConfigError, match=r"stage 'baseline' was started in 2 processes.*--launch"):
        run(config)
    assert not list(tmp_path.iterdir())


@given(processes=st.integers(1, 16), share=st.integers(1, 64), most=st.integers(1, 80))
def test_a_step_has_the_same_rows_whatever_the_number_of_processes(processes, share, most):
    size, passes = micro_batch(processes * share, most, processes)
    assert size * passes * processes == processes * share
    assert 1 <= size <= most


def test_stages_that_train_are_launched_and_the_others_are_not():
    todo = launch_run.commands(
        "grpo", ["seed=1"], STAGES, Launch("ddp", 4, read_launch("ddp").path), resume=True, live=False
    )
    asked = [
        [part for part, before in zip(command[1:], command, strict=False) if before == "--stage"] for command in todo
    ]
    assert asked == [["baseline"], ["align", "train"], ["evaluate", "report"]]
    assert ["accelerate.commands.launch" in command for command in todo] == [False, True, False]
    at = todo[1].index("--num_processes")
    assert todo[1][at + 1] == "4"
    for command in todo:
        at = command.index("ballast.pipeline.cli")
        assert command[at : at + 4] == ["ballast.pipeline.cli", "run", "grpo", "seed=1"]
        assert {"--resume", "--no-live"} <= set(command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "2"], "name one by --launch"),
        (["--launch", "fsdp2"], "it shards the parameters"),
        (["--launch", "nowhere.yaml"], "no launch file can be read there"),
        (["--launch", "ddp", "--processes", "7"], "among 7 processes"),
    ],
)
def test_the_command_refuses_a_launch_before_anything_runs(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["run", "grpo", f'out="{tmp_path}"', *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_launch_shows_its_configuration_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_run, "run_commands", lambda todo: pytest.fail("something was run"))
    result = CliRunner().invoke(app, ["run", "grpo", f'out="{tmp_path}"', "--launch", "ddp", "--dry-run"])
    assert result.exit_code == 0
    assert "prompts_per_step" in result.stdout


def test_nothing_is_run_after_a_stage_that_failed(tmp_path):
    def python(code):
        return [sys.executable, "-c", code]

    after = python(f"open({str(tmp_path / 'made')!r}, 'w')")
    assert launch_run.run_commands([python("pass"), python("raise SystemExit(2)"), after]) == 2
    assert not (tmp_path / "made").exists()
    assert launch_run.run_commands([python("pass"), after]) == 0
    assert (tmp_path / "made").exists()


def test_a_terminated_launch_ends_its_stage_first(tmp_path):
    """The stage writes down that it was asked to end, and the launch ends after it with the stage's code."""
    stage = f"""
import pathlib, signal, time
def end(*_):
    pathlib.Path({str(tmp_path / "ended")!r}).write_text("yes")
    raise SystemExit(5)
signal.signal(signal.SIGTERM, end)
pathlib.Path({str(tmp_path / "begun")!r}).write_text("yes")
time.sleep(60)
"""
    launch = f"""
import sys
from ballast.pipeline.launch_run import run_commands
sys.exit(run_commands([[sys.executable, "-c", {stage!r}], [sys.executable, "-c", ""]]))
"""
    with subprocess.Popen([sys.executable, "-c", launch], env=os.environ) as process:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 5
    assert (tmp_path / "ended").exists()
