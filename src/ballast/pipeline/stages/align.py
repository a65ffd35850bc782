"""align: a warm start by SFT on answers, before GRPO.

A model that never refuses gives GRPO nothing to prefer. This stage imitates answers (helpful refusals, good
short answers) with a LoRA, by TRL's SFTTrainer, and ends in a *merged* model folder: every reference and
every later adapter starts there, so that "adapter switched off" means the aligned model.

Writes `model/` (weights, tokenizer, prompt format) and `training.json`.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ballast.errors import DataError
from ballast.pipeline import ranks
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_base import LoraConfig
from ballast.pipeline.context import RunContext, check_one_device, load_policy
from ballast.pipeline.data import Row, draw, load_rows, normalise
from ballast.pipeline.prompting import PromptFormat


def run_stage(context: RunContext, folder: Path) -> None:
    """Train the adapter, merge it, write the folder."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from ballast.pipeline.run_card import write_run_card  # which asks for this module's rows
    from ballast.pipeline.training.callbacks import MetricsCallback
    from ballast.pipeline.training.merge import save_merged

    check_one_device()
    config, settings = context.config, context.config.align
    rows = alignment_rows(context)
    if settings.rehearse:
        context.generator(context.start_model)  # by all processes, whose engines start together
    own = ranks.on_main(lambda: rehearsed_answers(context, rows)) if settings.rehearse else {}
    examples = [
        encode_answer(context.prompt_format, row, settings.max_length, own.get(row.id), settings.opening_tokens)
        for row in rows
    ]
    args = SFTConfig(
        output_dir=str(folder / "trainer"),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size // ranks.world(),
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
    with context.live("align"):
        trainer.train()
    seconds = time.perf_counter() - started
    tokens = sum(len(example["input_ids"]) for example in examples) * settings.epochs
    record = {"rows": len(rows), "rehearsed": len(own), "seconds": seconds, "tokens_per_s": tokens / seconds}

    def write() -> None:
        save_merged(trainer.model, context.tokenizer, context.prompt_format, folder / "model")
        write_run_card(context, folder / "model", "align")
        (folder / "training.json").write_text(json.dumps(record))

    ranks.on_main(write)


def alignment_rows(context: RunContext) -> list[Row]:
    """The rows of this stage; see `rows_with_answers`. Where `align.harmful_share` is set, harmful prompts are drawn."""
    config, share = context.config, context.config.align.harmful_share
    rows = rows_with_answers(config, config.align.data, "align.data", config.align.max_rows)
    if share is None:
        return rows
    harmful = [row for row in rows if row.kind == "harmful"]
    kept = {row.id for row in draw(harmful, round(share / (1 - share) * (len(rows) - len(harmful))), config.seed)}
    return [row for row in rows if row.kind != "harmful" or row.id in kept]


def rows_with_answers(config: RunConfig, sources: Sequence[str], key: str, max_rows: int | None) -> list[Row]:
    """Rows with answers, none of whose prompts is measured on.

    Args:
        config: the run.
        sources: where the rows come from.
        key: key of the configuration that names the sources, for errors.
        max_rows: at most this many, drawn by the run's seed; None takes all.

    Raises:
        DataError: no source, no answer, or a prompt that is measured on too.
    """
    rows = load_rows(sources, "train", config.data, answers=True)
    check_not_measured(config, rows, key)
    return draw(rows, max_rows, config.seed)


def check_not_measured(config: RunConfig, rows: Sequence[Row], key: str) -> None:
    """No prompt of these rows is a test prompt, or one that the monitor measures on.

    Raises:
        DataError: one is; it names `key`, the rows' own in the configuration.
    """
    measured = {"data.test": config.data.test}
    if config.monitor.enabled and config.monitor.suite is not None:
        measured["monitor.suite"] = config.monitor.suite
    for name, sources in measured.items():
        prompts = {normalise(row.prompt) for row in load_rows(sources, "test", config.data)}
        shared = [row.id for row in rows if normalise(row.prompt) in prompts]
        if shared:
            raise DataError(
                f"{len(shared)} of {len(rows)} rows of {key} are prompts of {name} too (first: row {shared[0]}), so memory would be "
                f"measured; choose other sources for {key} or {name}"
            )


def rehearsed_answers(context: RunContext, rows: Sequence[Row]) -> dict[str, tuple[int, ...]]:
    """What the start model answers to the rows that are not harmful, as token ids by row id.

    An answer that refuses or is not coherent is left out, so that the one in the data takes its place.
    """
    from ballast.rewards.coherence import coherence
    from ballast.rewards.refusal import is_refusal

    settings = context.config.align
    # Not cut to `opening_tokens`: a refusal is often told by what comes after its first words.
    sampling = settings.sampling
    asked = [row for row in rows if row.kind != "harmful"]
    generator = context.generator(context.start_model)
    with context.progress("align: rehearsing", len(asked)) as done:
        answers = generator.generate(context.encode_prompts(asked, sampling), sampling, context.config.seed, done)
    return {
        row.id: answer.ids
        for row, answer in zip(asked, answers, strict=True)
        if not is_refusal(answer.text) and coherence(answer.text, answer.truncated).ok
    }


def encode_answer(
    prompt_format: PromptFormat,
    row: Row,
    max_length: int,
    own: Sequence[int] | None = None,
    opening_tokens: int | None = None,
) -> dict[str, list[int]]:
    """Token ids of prompt and answer, with the loss on the answer and its end-of-turn token.

    Args:
        own: ids to imitate instead of the row's answer, with the end-of-turn token where there was one: an answer
            that was cut off does not teach to stop there.
        opening_tokens: keep at most this many tokens of the answer; None keeps all.
    """
    tokenizer = prompt_format.tokenizer
    if own is None and row.response is None:
        raise DataError(
            f"row {row.id} has no answer to imitate; give data.response_column, or leave its source out of align.data"
        )
    prompt = prompt_format.encode_request(row.id, row.prompt)
    if own is None:
        answer = tokenizer(row.response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
    else:
        answer = list(own)
    if len(prompt) >= max_length:
        raise DataError(
            f"row {row.id}: its prompt has {len(prompt)} tokens, so align.max_length = {max_length} leaves no room for the answer; raise it or drop the row"
        )
    ids = (prompt + answer[:opening_tokens])[:max_length]
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
