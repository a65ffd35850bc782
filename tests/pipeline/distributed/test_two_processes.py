"""A run on two gloo processes under DDP is the run on one process with twice the accumulation: figures, decisions, weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.model, pytest.mark.long, pytest.mark.timeout(3600)]

METHODS = ("sft", "grpo")
JOBS = [
    *(f"{method}-whole-{number}" for method in METHODS for number in (1, 2)),
    *(f"{method}-{kind}-{number}" for method in METHODS for kind in ("fresh", "stale") for number in (1, 2)),
    *(f"{method}-{kind}-2" for method in METHODS for kind in ("unwatched", "resumed")),
]
# What differs between two runs of the same training.
CLOCKS = {"time", "step_time", "guard/seconds", "probing/seconds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, embedded_folder: Path) -> Path:
    """The run folders of all jobs."""
    found = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "tests.pipeline.distributed.two_processes", str(found), *JOBS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True, timeout=3500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return found


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] in kinds]


def steps(run: Path) -> dict[int, dict[str, Any]]:
    """Figures of every step, the latest where a step was made twice."""
    return {line["step"]: {k: v for k, v in line.items() if k not in CLOCKS} for line in events(run, "step")}


def adapter(run: Path) -> dict[str, Any]:
    return load_file(run / "train" / "adapter" / "adapter_model.safetensors")


def assert_same_training(one: Path, other: Path, tolerance: float) -> None:
    first, second = steps(one), steps(other)
    assert first.keys() == second.keys() == {1, 2, 3, 4}
    for step, figures in first.items():
        assert second[step] == pytest.approx(figures, rel=tolerance, abs=tolerance), step
    weights = adapter(other)
    for name, tensor in adapter(one).items():
        assert (tensor - weights[name]).abs().max() <= tolerance, name
        assert tensor.any(), name  # it was trained


@pytest.mark.parametrize("kind", ["whole", "fresh", "stale"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one_with_twice_the_accumulation(folder: Path, method: str, kind: str) -> None:
    """`whole` has shaping, SafeGrad, L2, a monitor that turns back once; the others safety-aware probing."""
    assert_same_training(folder / f"{method}-{kind}-1", folder / f"{method}-{kind}-2", 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_monitor_decides_the_same_and_is_written_down_once(folder: Path, method: str) -> None:
    told = ("monitor_baseline", "monitor", "monitor_trip", "monitor_rollback", "monitor_lower_lr")
    both = [events(folder / f"{method}-whole-{number}", *told) for number in (1, 2)]
    kinds = [[(event["event"], event["step"], event.get("to_step")) for event in of] for of in both]
    # A good point after step 1, a fall after step 2, back to step 1 with half the rate; both steps after it are good.
    assert kinds[0] == [
        ("monitor_baseline", 0, None), ("monitor", 1, None), ("monitor", 2, None), ("monitor_trip", 2, None),
        ("monitor_rollback", 2, 1), ("monitor_lower_lr", 2, None), ("monitor", 3, None), ("monitor", 4, None),
    ]  # fmt: skip
    assert kinds[1] == kinds[0]
    (trip, alone) = (next(event for event in of if event["event"] == "monitor_trip") for of in reversed(both))
    assert trip["flipped"] == alone["flipped"]
    assert len(trip["flipped"]) == 12
    assert trip["rows"] == alone["rows"]  # those of both processes
    for number in (1, 2):
        answers = pq.read_table(folder / f"{method}-whole-{number}" / "train" / "monitor" / "step-00003.parquet")
        assert answers.num_rows == 15  # each prompt of the suite once


def test_every_answer_is_judged_once_and_written_once(folder: Path) -> None:
    alone, both = (pq.read_table(folder / f"sft-whole-{n}" / "train" / "answers.parquet").to_pylist() for n in (1, 2))
    assert len(both) == 8
    assert both == alone


def test_the_table_of_completions_has_each_once(folder: Path) -> None:
    def rows(number: int) -> list[Any]:
        table = pq.read_table(folder / f"grpo-whole-{number}" / "train" / "completions").to_pylist()
        return sorted((row["step"], row["prompt"], row["token_ids"]) for row in table)

    assert len(rows(2)) == 4 * 8  # steps, rows a step
    assert rows(2) == rows(1)
    record = json.loads((folder / "grpo-whole-2" / "train" / "training.json").read_text())
    assert record["completions"] == 32


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_training_goes_on_in_two_processes_to_the_same_end(folder: Path, method: str) -> None:
    assert_same_training(folder / f"{method}-unwatched-2", folder / f"{method}-resumed-2", 0.0)
    assert [event["step"] for event in events(folder / f"{method}-resumed-2", "training_resumed")] == [2]


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_has_one_record_and_one_line_a_step(folder: Path, method: str) -> None:
    run = folder / f"{method}-whole-2"
    assert [event["step"] for event in events(run, "step")] == [1, 2, 3, 4]
    assert len(events(run, "stage_started")) == len(events(run, "stage_finished")) == 1
    assert not list(run.glob("*.partial"))
