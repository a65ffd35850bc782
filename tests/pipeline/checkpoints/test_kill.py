"""Processes are killed, at random moments and at each place that could be half-way; the run then goes on to the same end."""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.long, pytest.mark.model, pytest.mark.timeout(3600)]

RANDOM_KILLS = 20
CLOCKS = ("time", "step_time", "guard/seconds", "probing/seconds")
OVERRIDES = [
    *("model.dtype=float32", "generation={type: transformers}", "align.enabled=false"),
    *("guard={type: rules}", "judge={type: ngram}", "evaluate.samples=1", "evaluate.sampling.max_new_tokens=4"),
    *("train.steps=6", "train.prompts_per_step=2", "train.group_size=2", "train.micro_batch_size=2"),
    *("train.sampling.max_new_tokens=6", "train.lora.r=2", "train.learning_rate=1e-2", "train.checkpoint_every=1"),
    *("shaping.lagrangian.enabled=true", "regularization.ema_decay=0.5"),
]
# Of each place what it is reached by, and the call at which the process ends.
PLACES = {
    "generation": ("transformers.GenerationMixin.generate", 4),
    "scoring": ("ballast.rewards.guard_reward.GuardReward.__call__", 3),
    "optimizer step": ("torch.optim.AdamW.step", 3),
    "writing of a checkpoint, the first file": (
        "ballast.pipeline.checkpoints.training_state.TrainerState.save_to_json",
        2,
    ),
    "writing of a checkpoint, the last file": ("ballast.pipeline.checkpoints.manifest._contents", 3),
    "a checkpoint, before it has its name": ("ballast.pipeline.checkpoints.manifest._sync", 10),
    "evaluation": ("ballast.pipeline.evaluation.measure.summarize", 2),
    "the end of a training": ("ballast.pipeline.training.merge.save_merged", 1),
    "the end of a stage": ("ballast.pipeline.run_folder.versions", 2),
    "between stages": ("ballast.pipeline.run.stage_settings", 3),
}


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that begin with all libraries imported, and with nothing run."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(
        ["ballast.pipeline.run", "ballast.pipeline.training.grpo", "ballast.pipeline.checkpoints.callback", "datasets"]
    )
    return made


@pytest.fixture
def start(tmp_path: Path, tiny_model: Any, tokenizer: Any, processes: Any, monkeypatch: Any) -> Any:
    """Starts a process of the run of a name; gives it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from kill_worker import work

    tiny_model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    for name in ("train", "test"):
        rows = [
            {"prompt": f"A {name} question, number {n}?", "kind": ("harmful", "ordinary", "scary")[n % 3]}
            for n in range(6)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def make(name: str, place: str | None = None, call: int = 0) -> Any:
        data = [f"data.{part}={json.dumps([str(tmp_path / f'{part}.jsonl')])}" for part in ("train", "test")]
        own = [f"out={json.dumps(str(tmp_path))}", f"name={name}", f"model.name={json.dumps(str(tmp_path / 'start'))}"]
        process = processes.Process(target=work, args=([*own, *data, *OVERRIDES], place, call))
        process.start()
        return process

    return make


def finish(process: Any) -> None:
    process.join(600)
    assert process.exitcode == 0


def result(folder: Path) -> tuple[Any, ...]:
    """What a run ends with: figures of its steps, weights, and measurements; clocks left out."""
    from safetensors.torch import load_file

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {e["step"]: {k: v for k, v in e.items() if k not in CLOCKS} for e in lines if e["event"] == "step"}
    weights = {
        name: t.tolist() for name, t in load_file(folder / "train" / "adapter" / "adapter_model.safetensors").items()
    }
    measured = json.loads((folder / "evaluate" / "final.json").read_text())
    return steps, weights, {k: v for k, v in measured.items() if "per_s" not in k and "seconds" not in k}


def check(folder: Path, whole: tuple[Any, ...]) -> None:
    """It is at the same end, nothing finished was done twice, and nothing half-written is left."""
    assert result(folder) == whole
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    finished = [line["stage"] for line in lines if line["event"] == "stage_finished" and line["stage"] != "report"]
    assert len(finished) == len(set(finished))
    for n, line in enumerate(lines):
        if line["event"] == "training_resumed":
            assert all(later["step"] > line["step"] for later in lines[n:] if later["event"] == "step")
    assert not list(folder.rglob("*.partial"))


@pytest.fixture
def whole(start: Any, tmp_path: Path) -> tuple[Any, ...]:
    """The run that nobody stops."""
    finish(start("whole"))
    return result(tmp_path / "whole")


def test_a_run_that_is_killed_at_any_place_goes_on_to_the_same_end(start: Any, whole: Any, tmp_path: Path) -> None:
    for n, (name, (place, call)) in enumerate(PLACES.items()):
        process = start(f"place-{n}", place, call)
        process.join(600)
        assert process.exitcode == -signal.SIGKILL, name
        finish(start(f"place-{n}"))
        check(tmp_path / f"place-{n}", whole)


def test_a_run_that_is_killed_again_and_again_at_random_goes_on_to_the_same_end(start: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    finish(start("whole"))
    seconds = time.monotonic() - started
    ended = result(tmp_path / "whole")
    draw = random.Random(0)
    kills = runs = 0
    while kills < RANDOM_KILLS:
        runs += 1
        while kills < RANDOM_KILLS:
            process = start(f"random-{runs}")
            process.join(draw.uniform(0.1, 0.8) * seconds)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
        finish(start(f"random-{runs}"))
        check(tmp_path / f"random-{runs}", ended)
