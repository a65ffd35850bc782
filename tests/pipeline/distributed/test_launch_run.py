"""`ballast run CONFIG --launch ddp` on the CPU, through accelerate itself: a whole run, a hand-launched stage, and a failure."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import random_llama

from ballast.pipeline.launching import read_launch

pytestmark = [pytest.mark.model, pytest.mark.long, pytest.mark.timeout(3600)]

OVERRIDES = [
    *("model.dtype=float32", "generation={type: transformers}", "align.enabled=false"),
    *("guard={type: rules}", "judge={type: ngram}", "evaluate.samples=1", "evaluate.sampling.max_new_tokens=4"),
    *("train.steps=2", "train.prompts_per_step=2", "train.group_size=2", "train.micro_batch_size=2"),
    *("train.sampling.max_new_tokens=6", "train.lora.r=2"),
]
BALLAST = ["-m", "ballast.pipeline.cli"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Path, list[str]]:
    """A folder with model and prompts, and what a command says of them."""
    folder = tmp_path_factory.mktemp("launched")
    random_llama(len(tokenizer), tied=False).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    for name in ("train", "test"):
        rows = [
            {"prompt": f"A {name} question, number {n}?", "kind": ("harmful", "ordinary", "scary")[n % 3]}
            for n in range(6)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = [f"data.{part}={json.dumps([str(folder / f'{part}.jsonl')])}" for part in ("train", "test")]
    own = [f"out={json.dumps(str(folder))}", f"model.name={json.dumps(str(folder / 'start'))}"]
    return folder, [*own, *data, *OVERRIDES]


def python(*arguments: str) -> Any:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1700)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_a_run_trains_in_two_processes_and_does_the_rest_in_one(given: tuple[Path, list[str]]) -> None:
    folder, overrides = given
    done = python(*BALLAST, "run", "grpo", "name=whole", *overrides, "--launch", "ddp", "--processes", "2", "--no-live")
    assert done.returncode == 0, done.stderr[-4000:]
    run = folder / "whole"
    assert [event["stage"] for event in events(run, "stage_finished")] == ["baseline", "train", "evaluate", "report"]
    assert [event["step"] for event in events(run, "step")] == [1, 2]
    # Two processes, a file a step each.
    assert len(list((run / "train" / "completions").glob("*.parquet"))) == 4
    assert done.stderr.count("step 2/2") == 1  # the main process alone speaks


def test_a_stage_launched_by_hand_trains_and_what_is_wrong_is_said_once(given: tuple[Path, list[str]]) -> None:
    folder, overrides = given
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(read_launch("ddp").path), "--num_processes", "2"]
    done = python(*launch, *BALLAST, "train", "grpo", "name=hand", *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "hand" / "train" / "record.json").is_file()
    # The same run folder with other settings: the main process finds it, and it alone says so.
    wrong = python(*launch, *BALLAST, "train", "grpo", "name=hand", *overrides, "train.steps=3")
    assert wrong.returncode != 0
    assert wrong.stderr.count("holds stage 'train' from another configuration") == 1
    assert "MainProcessError" not in wrong.stderr
