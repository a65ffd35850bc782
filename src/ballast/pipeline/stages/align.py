"""align: a warm start by SFT on answers, before GRPO.

A model that never refuses gives GRPO nothing to prefer. This stage imitates answers (helpful refusals, good
short answers) with a LoRA, by TRL's SFTTrainer, and ends in a *merged* model folder: every reference and
every later adapter starts there, so that "adapter switched off" means the aligned model.

Writes `model/` (weights, tokenizer, prompt format) and `training.json`.
"""

import json
import time
from pathlib import Path
from typing import Any

from ballast.errors import DataError
from ballast.pipeline.config import LoraConfig
from ballast.pipeline.context import RunContext, check_one_device, load_policy
from ballast.pipeline.data import Row, draw, load_rows, normalise
from ballast.pipeline.prompting import PromptFormat


def run_stage(context: RunContext, folder: Path) -> None:
    """Train the adapter, merge it, write the folder."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from ballast.pipeline.training.callbacks import MetricsCallback
    from ballast.pipeline.training.merge import save_merged

    check_one_device()
    config, settings = context.config, context.config.align
    rows = alignment_rows(context)
    examples = [encode_answer(context.prompt_format, row, settings.max_length) for row in rows]
    args = SFTConfig(
        output_dir=str(folder / "trainer"),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        max_length=settings.max_length,
        completion_only_loss=True,
        bf16=config.model.dtype == "bfloat16",  # autocast: the adapter's weights stay in fp32
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=5,
        save_strategy="no",
        report_to=list(config.train.report_to) or "none",
        seed=config.seed,
        disable_tqdm=True,
    )
    policy = load_policy(context.start_model, config.model.dtype)
    trainer = SFTTrainer(
        model=policy,
        args=args,
        train_dataset=Dataset.from_list(examples),
        processing_class=context.tokenizer,
        peft_config=peft_config(settings.lora),
        callbacks=[MetricsCallback(context, "align")],
    )
    quiet(trainer)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    tokens = sum(len(example["input_ids"]) for example in examples) * settings.epochs
    save_merged(trainer.model, context.tokenizer, context.prompt_format, folder / "model")
    (folder / "training.json").write_text(
        json.dumps({"rows": len(rows), "seconds": seconds, "tokens_per_s": tokens / seconds})
    )


def alignment_rows(context: RunContext) -> list[Row]:
    """Rows with answers, none of whose prompts is a test prompt.

    Raises:
        DataError: no source, no answer, or a prompt that is measured on too.
    """
    config = context.config
    rows = load_rows(config.align.data, "train", config.data, answers=True)
    test = {normalise(row.prompt) for row in load_rows(config.data.test, "test", config.data)}
    shared = [row.id for row in rows if normalise(row.prompt) in test]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(rows)} rows of align.data are test prompts too (first: row {shared[0]}); choose other sources for align.data or data.test"
        )
    return draw(rows, config.align.max_rows, config.seed)


def encode_answer(prompt_format: PromptFormat, row: Row, max_length: int) -> dict[str, list[int]]:
    """Token ids of prompt and answer, with the loss on the answer and its end-of-turn token."""
    tokenizer = prompt_format.tokenizer
    if row.response is None:
        raise DataError(
            f"row {row.id} has no answer to imitate; give data.response_column, or leave its source out of align.data"
        )
    prompt = prompt_format.encode_request(row.id, row.prompt)
    answer = tokenizer(row.response, add_special_tokens=False, split_special_tokens=True)["input_ids"] + [
        tokenizer.eos_token_id
    ]
    if len(prompt) >= max_length:
        raise DataError(
            f"row {row.id}: its prompt has {len(prompt)} tokens, so align.max_length = {max_length} leaves no room for the answer; raise it or drop the row"
        )
    ids = (prompt + answer)[:max_length]
    return {"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * (len(ids) - len(prompt))}


def peft_config(lora: LoraConfig) -> Any:
    """The adapter of a configuration, as PEFT takes it."""
    from peft import LoraConfig as PeftLora

    modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return PeftLora(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=modules, task_type="CAUSAL_LM"
    )


def quiet(trainer: Any) -> None:
    """Take out the callback that prints every log as a dictionary; ours shows and keeps them."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
