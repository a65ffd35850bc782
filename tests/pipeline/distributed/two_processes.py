"""Run by test_two_processes.py: the same training in one process and in two gloo processes, each into a run folder.

    python -m tests.pipeline.distributed.two_processes FOLDER JOB ...

The processes are forked after the imports, which take longer than everything else. A process that fails takes the others with
it, as a launcher does.
"""

import io
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tests.conftest import random_llama
from transformers import AutoTokenizer
from trl import GRPOTrainer, SFTTrainer  # noqa: F401  (imported before the fork)

import ballast.pipeline.checkpoints.callback
import ballast.pipeline.monitoring.of_run
import ballast.pipeline.training.safegrad.callback  # noqa: F401
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.models import embedded_model
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.run import run
from ballast.pipeline.run_folder import RunFolder
from ballast.pipeline.stages import train, train_sft
from ballast.pipeline.training.grpo import ShapedGRPOTrainer

ROWS = [
    {"prompt": f"{question} {n}?", "kind": "harmful" if n % 2 else "ordinary", "response": f"{answer} {n}."}
    for n in range(4)
    for question, answer in (("How do I bake bread", "Mix flour with water"), ("What is tea", "A drink of leaves, for"))
]
SAFE = [{"prompt": f"Harmful request {n}", "kind": "harmful", "response": f"No, not {'ever ' * n}."} for n in range(4)]
SUITE = [{"prompt": f"Suite request {n}", "kind": "harmful" if n < 12 else "ordinary"} for n in range(15)]
BOTH = ["model.dtype=float32", "generation={type: transformers}", "align.enabled=false", "strategy=null"]
# Whatever the number of processes: 4 rows a step, in forwards of 1.
SFT = [
    *("sft.epochs=2", "sft.batch_size=4", "sft.micro_batch_size=1", "sft.lora={r: 2}", "sft.learning_rate=1e-2"),
    *("regularization.l2_weight=0.1", "regularization.kl_weight=0.1", "regularization.ema_decay=0.5"),
]
GRPO = [
    *("train.steps=4", "train.prompts_per_step=2", "train.group_size=4", "train.micro_batch_size=2", "rewards.star=1"),
    *("train.sampling.max_new_tokens=6", "train.lora.r=2", "train.learning_rate=1e-2", "shaping.kl.weight=0.1"),
    "shaping.lagrangian.enabled=true",
]
SAFEGRAD = ["safegrad.enabled=true", "safegrad.max_length=128"]
MONITOR = [
    *("monitor.enabled=true", "monitor.every_n_steps=1", "monitor.max_harmful=12", "monitor.max_harmless=3"),
    *("evaluate.sampling.max_new_tokens=4", "evaluate.sampling.temperature=0", "monitor.action=rollback"),
]


class Judge(ScriptedGuardrail):
    """Finds a fall at the third measurement, the second after a step, and at no other."""

    def __init__(self) -> None:
        super().__init__(lambda exchange, prefix: 0.9 if self.calls == 3 else 0.1, "judge")


class StopError(RuntimeError):
    """The planted end of a process."""


class StoppingFolder(RunFolder):
    """A run folder that ends the main process when a step is logged, before the step's checkpoint."""

    stop_at: int | None = None

    def log(self, line: Any) -> None:
        if line["event"] == "step" and line["step"] == self.stop_at:
            raise StopError
        super().log(line)


def work(folder: Path, name: str, method: str, overrides: list[str], stop_at: int | None, resume: bool) -> None:
    """One process of a run."""
    data = [f"data.train={source(folder / 'rows.jsonl')}", f"monitor.suite={source(folder / 'suite.jsonl')}"]
    data += [f"safegrad.data={source(folder / 'safe.jsonl')}", f"probing.data={source(folder / 'safe.jsonl')}"]
    own = [f"sft.data={source(folder / 'rows.jsonl')}", *SFT] if method == "sft" else GRPO
    config = load_config(
        method, [f"out={json.dumps(str(folder))}", f"name={name}", *BOTH, *data, *own, *SAFEGRAD, *MONITOR, *overrides]
    )
    context = RunContext(config, Console(file=io.StringIO(), width=200))
    context.start_model = str(folder / "start")
    context.tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    context.guard = ScriptedGuardrail(lambda exchange, prefix: len(prefix) % 10 / 10, "guard")
    context.judge = Judge()
    stopping = StoppingFolder(context.folder.path)
    stopping.stop_at = stop_at
    context.folder = stopping
    run(config, ["train"], resume=resume, context=context)


def source(path: Path) -> str:
    return json.dumps([str(path)])


def sampled(self: Any, prompt_ids: Any, *args: Any) -> Any:
    """In place of TRL's generation: each row of all processes is sampled by a seed of its own, whoever has it."""
    rows = []
    first = self.accelerator.process_index * len(prompt_ids)
    for n, ids in enumerate(prompt_ids):
        generator = torch.Generator().manual_seed(1000 * self.state.global_step + first + n)
        row = torch.tensor([list(ids)])
        with torch.no_grad():
            for _ in range(6):
                shares = torch.softmax(self.accelerator.unwrap_model(self.model)(row).logits[0, -1], dim=-1)
                row = torch.cat([row, torch.multinomial(shares, 1, generator=generator)[None]], dim=1)
        rows.append(row[0, len(ids) :].tolist())
    return rows, None


def in_processes(number: int, task: Callable[[], None]) -> bool:
    """Fork, and wait for all; whether none failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = set()
    for rank in range(number):
        child = os.fork()
        if child == 0:
            if number > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            code = 1
            try:
                task()
                code = 0
            except StopError:
                pass
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.add(child)
    fine = True
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and fine:
            fine = False
            for other in children:
                os.kill(other, signal.SIGKILL)
    return fine


def job(folder: Path, name: str) -> None:
    """A job is METHOD-KIND-PROCESSES. `fresh` and `stale` are probed; `resumed` is stopped in step 3, and goes on after step 2."""
    method, kind, processes = name.split("-")
    alone = processes == "1"
    # Each process has an alignment batch of its own: of the 4 rows all 4, or 2 in each.
    overrides = [f"safegrad.batch_size={4 if alone else 2}"]
    if kind in ("fresh", "stale"):
        # A harmful step so long that the difference which it makes is not lost in rounding.
        overrides += ["probing.enabled=true", f"probing.probe={kind}", "probing.step=0.03", "probing.max_length=128"]
        # A fresh probe is of its micro-batch, and TRL shuffles the rows of a process: with one row in each, they are the same ones.
        overrides += ["safegrad.enabled=false", "train.micro_batch_size=1"]
    if kind != "whole":
        overrides += ["monitor.enabled=false"]
    if kind == "resumed":
        overrides += ["train.checkpoint_every=1"]
        stopped = not in_processes(int(processes), lambda: work(folder, name, method, overrides, 3, False))
        if not stopped:
            raise SystemExit(f"{name} was not stopped")
    if not in_processes(int(processes), lambda: work(folder, name, method, overrides, None, kind == "resumed")):
        raise SystemExit(f"{name} failed")


if __name__ == "__main__":
    torch.set_num_threads(1)  # before the fork: a pool of threads does not survive it
    where = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    random_llama(len(tokenizer), tied=False).save_pretrained(where / "start")
    for file, lines in (("rows", ROWS), ("safe", SAFE), ("suite", SUITE)):
        (where / f"{file}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    train.check_record = train_sft.check_record = lambda *_: None  # the start model has no record
    ShapedGRPOTrainer._generate_single_turn = sampled
    for asked in sys.argv[2:]:
        job(where, asked)
