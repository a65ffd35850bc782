"""Run by test_safegrad_distributed.py: two gloo processes train with SafeGrad, and each writes down what it saw.

    python -m tests.pipeline.training.safegrad_two_processes FOLDER

The processes are forked after the imports, which take longer than everything else.
"""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from tests.pipeline.training import safegrad_reference as reference
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ballast import SafeGrad
from ballast.models import embedded_model

WORLD, LIMIT, RHO = 2, 0.25, 0.7
TASK, SAFE = reference.rows(reference.TASK_LENGTHS, 0), reference.rows(reference.SAFE_LENGTHS, 1)


def ddp(rank: int, folder: Path, accumulation: int) -> None:
    """A real trainer under DDP: 8 rows a step over both processes."""
    args = SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4 // accumulation, learning_rate=2e-2, bf16=False,
        gradient_accumulation_steps=accumulation, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, seed=3,
        gradient_checkpointing=False, max_grad_norm=LIMIT, lr_scheduler_type="constant", ddp_backend="gloo", completion_only_loss=True,
    )  # fmt: skip
    before, after = reference.Watcher(), reference.Watcher()
    trainer = SFTTrainer(
        reference.small_model(), args, train_dataset=TASK, processing_class=AutoTokenizer.from_pretrained(embedded_model()),
        callbacks=[before, SafeGrad(SAFE, rho=RHO, batch_size=2), after],
    )  # fmt: skip
    assert trainer.args.world_size == WORLD
    trainer.train()
    torch.save({"weights": before.weights, "gradients": after.gradients}, folder / f"ddp{accumulation}-{rank}.pt")


def fsdp2(rank: int, folder: Path) -> None:
    """Parameters sharded by `fully_shard`, the callback driven as a trainer drives it, and a watchdog beside it."""
    Accelerator(cpu=True)
    model = reference.small_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    args: Any = SimpleNamespace(
        world_size=WORLD, process_index=rank, max_grad_norm=LIMIT, bf16=False, fp16=False, optim="adamw_torch", parallelism_config=None
    )  # fmt: skip
    callbacks = [
        SafeGrad(SAFE, rho=RHO, batch_size=2),
        SafeGrad(SAFE, mode="watchdog", tolerance=1e-4, halvings=1, batch_size=3),
    ]
    # Of two trainers, to the callbacks: one has a single SafeGrad.
    states: list[Any] = [SimpleNamespace(global_step=0, log_history=[]) for _ in callbacks]
    for callback, state in zip(callbacks, states, strict=True):
        callback.on_train_begin(args, state, None, model=model)  # type: ignore[arg-type]
    total = sum(sum(row["completion_mask"]) for row in TASK)
    kept: list[dict[str, Any]] = []
    for step in range(3):
        for row in list(TASK)[rank::WORLD]:
            labels = torch.tensor([row["input_ids"]]).masked_fill(~torch.tensor([row["completion_mask"]]).bool(), -100)
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
            (loss * WORLD / total).backward()  # FSDP2 takes the mean over processes
        torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        weights = full(model, lambda p: p)
        for callback, state in zip(callbacks, states, strict=True):
            state.global_step = step
            callback.on_pre_optimizer_step(args, state, None, model=model, optimizer=optimizer)  # type: ignore[arg-type]
        gradients = full(model, lambda p: p.grad)
        optimizer.step()
        proposed = full(model, lambda p: p)
        for callback, state in zip(callbacks, states, strict=True):
            callback.on_optimizer_step(args, state, None, model=model, optimizer=optimizer)  # type: ignore[arg-type]
        share = callbacks[1]._figures["watchdog_kept_share"][-1]
        kept.append(
            {"weights": weights, "gradients": gradients, "proposed": proposed, "after": full(model, lambda p: p), "share": share}
        )  # fmt: skip
        optimizer.zero_grad()
    for callback, state in zip(callbacks, states, strict=True):
        callback.on_train_end(args, state, None)  # type: ignore[arg-type]
    torch.save(kept, folder / f"fsdp2-{rank}.pt")


def full(model: Any, read: Callable[[Any], Any]) -> dict[str, torch.Tensor]:
    return {name: read(p).full_tensor().detach().clone() for name, p in model.named_parameters()}


def in_two_processes(work: Callable[[int], None]) -> None:
    """Fork, and wait for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)
            }  # fmt: skip
            code = 1
            try:
                work(rank)
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                if code:
                    import traceback

                    traceback.print_exc()
                os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise SystemExit("a process failed")


if __name__ == "__main__":
    torch.set_num_threads(1)  # before the fork: a pool of threads does not survive it
    where = Path(sys.argv[1])
    in_two_processes(lambda rank: ddp(rank, where, 1))
    in_two_processes(lambda rank: ddp(rank, where, 4))
    in_two_processes(lambda rank: fsdp2(rank, where))
