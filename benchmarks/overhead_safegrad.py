"""The part `safegrad` of `step_overhead.py`: a LoRA step of SFT with and without SafeGrad.

The task batch is 16 rows of 256 tokens, the alignment batch 8 rows with 128 completion tokens each (24 tokens of prompt before
them). A variant's figure is the mean over four steps, in which `every 4` makes one safety gradient.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from ballast import SafeGrad
from ballast.models import EMBEDDED_MODEL, resolve_model

PROMPT_TOKENS = 24
TASK_TOKENS = 256
SAFE_ROWS, SAFE_TOKENS = 8, 128
STEPS = 5  # the first is not counted
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "every step": {},
    "every 4": {"every_n_steps": 4},
    "every step, adam": {"metric": "adam"},
    "every step, live reference": {"cache_reference": False},
    "trust region": {"mode": "trust_region"},
    "watchdog": {"mode": "watchdog", "tolerance": 100.0},  # every update stands: two forwards, no halving
}


def safegrad_variant(name: str, arguments: argparse.Namespace) -> Any:
    """A trainer of SFT on rows of random tokens."""
    from step_overhead import common, lora, policy  # which imports this module

    options = VARIANTS[name]
    args = SFTConfig(
        **(common(arguments) | {"max_steps": STEPS}),
        per_device_train_batch_size=arguments.task_rows,
        max_length=TASK_TOKENS,
        completion_only_loss=True,
    )
    rows = random_rows(arguments.task_rows * STEPS, TASK_TOKENS, seed=0)
    refusals = random_rows(SAFE_ROWS * 2, PROMPT_TOKENS + SAFE_TOKENS, seed=1)
    trainer = SFTTrainer(
        policy(arguments),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(resolve_model(EMBEDDED_MODEL)),
        peft_config=lora(),
        callbacks=[] if options is None else [SafeGrad(refusals, batch_size=SAFE_ROWS, **options)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def random_rows(count: int, length: int, seed: int) -> list[dict[str, list[int]]]:
    """Rows of random tokens, the first of them the prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(10, 49_000, (length,), generator=generator).tolist(),
            "completion_mask": [0] * PROMPT_TOKENS + [1] * (length - PROMPT_TOKENS),
        }
        for _ in range(count)
    ]
