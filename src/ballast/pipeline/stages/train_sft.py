"""train, where `train.method` is sft: imitation of answers, each token as much as the guard trusts the text around it.

The guard judges every segment of every answer once, before training (or did so in the stage `score`, for the model's
own completions). An answer that it cannot judge is left out and counted. Then TRL's SFT learns a LoRA on the aligned
model, with the loss that `sft.loss` names.

Writes `adapter/`, `model/` (merged), `answers.parquet` (each answer's cuts, risk and STAR) and `training.json`, with how
often each STAR occurs in each kind. Killed, it goes on from its last checkpoint, where `train.checkpoint_every` makes some.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ballast.errors import DataError
from ballast.guardrails.types import RiskTrace
from ballast.pipeline import ranks
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_sft import ConstrainedLoss, PlainLoss
from ballast.pipeline.context import RunContext, check_one_device, load_policy
from ballast.pipeline.data import Row, draw
from ballast.pipeline.launching import micro_batch
from ballast.pipeline.model_record import check_record
from ballast.pipeline.stages.align import encode_answer, quiet, rows_with_answers
from ballast.pipeline.stages.train import write_trained
from ballast.rewards.outage import stop_above_limit

if TYPE_CHECKING:
    from ballast.pipeline.training.sft_rows import Answer, JudgedAnswer


def run_stage(context: RunContext, folder: Path) -> None:
    """Judge the answers, train the adapter, write both down."""
    from datasets import Dataset

    from ballast.pipeline.checkpoints.resumable import ResumableTraining
    from ballast.pipeline.monitoring.of_run import monitored
    from ballast.pipeline.safe_updates import safegrad_callbacks
    from ballast.pipeline.safety_layers import adapter, callbacks_after, callbacks_before, trainer_with
    from ballast.pipeline.training.callbacks import MetricsCallback
    from ballast.pipeline.training.sft import ShapedSFTTrainer

    check_one_device()
    config, settings = context.config, context.config.sft
    check_record(Path(context.reference_model), context.prompt_format)
    rows, counts = training_rows_of(context, folder)
    policy = load_policy(context.reference_model, config.model.dtype)
    trainer_class, safe = trainer_with(context, ShapedSFTTrainer)
    with context.progress("train: reference", len(rows)) as done:
        trainer = trainer_class(
            policy,
            sft_arguments(config, folder / "trainer"),
            Dataset.from_list(rows),
            loss=settings.loss,
            progress=done,
            processing_class=context.tokenizer,
            peft_config=adapter(context, policy, settings.lora),
            callbacks=[
                *callbacks_before(config),
                *safegrad_callbacks(context),
                *callbacks_after(config),
                MetricsCallback(context, "train"),
            ],
            **safe,
        )
    quiet(trainer)
    training = ResumableTraining(context, folder)
    monitored(context, trainer, folder, training.store)
    with context.live("train"):
        seconds = training.train(trainer)
    done = trainer.state.global_step
    # A monitor may have ended the training early.
    tokens = sum(len(row["input_ids"]) for row in rows) * settings.epochs * done / trainer.state.max_steps
    record = {"steps": done, "seconds": seconds, "tokens_per_s": tokens / seconds, **counts}
    ranks.on_main(lambda: write_trained(context, trainer, folder, record))


def training_rows_of(context: RunContext, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows to train on, and what training.json says about them.

    Raises:
        DataError: no answer, one that is also measured on, or none that could be judged.
        GuardError: more is unscored than `train.max_unscored_share`.
    """
    from ballast.pipeline.training.sft_rows import columns, star_histogram, star_of_segments

    settings = context.config.sft
    if isinstance(settings.loss, PlainLoss | ConstrainedLoss):
        answers = [answer for answer, _ in _answers(context)]
        return [columns(answer, settings.max_length) for answer in answers], {"answers": len(answers), "unscored": 0}
    judged = _judged(context)
    star = [star_of_segments(row.trace, settings.loss) for row in judged]
    ranks.on_main(lambda: _write_answers(folder / "answers.parquet", judged, star))
    scored = [(row, star_K) for row, star_K in zip(judged, star, strict=True) if star_K is not None]
    unscored = len(judged) - len(scored)
    context.say(f"  {len(judged)} answers judged, {unscored} unscored and left out")
    reason = next((row.trace.reason for row, star_K in zip(judged, star, strict=True) if star_K is None), None)
    limit, where = context.config.train.max_unscored_share, "among the answers to imitate"
    stop_above_limit(unscored, len(judged), limit, context.guard.name, reason, where)
    if not scored:
        raise DataError("none of the answers to imitate could be scored, so there is nothing to learn; mend the guard")
    histogram = star_histogram([(row.answer.kind, star_K) for row, star_K in scored])
    rows = [columns(row.answer, settings.max_length, star_K, row.segments) for row, star_K in scored]
    return rows, {"answers": len(judged), "unscored": unscored, "star_histogram": histogram}


def _judged(context: RunContext) -> list["JudgedAnswer"]:
    from ballast.pipeline.training.sft_rows import judge, judged_before
    from ballast.rewards.guard_reward import GuardReward

    config = context.config
    pairs = _answers(context)
    if config.sft.rows == "rollouts":
        return [judged_before(answer, trace, context.tokenizer) for answer, trace in pairs if trace is not None]
    reward = GuardReward(context.guard, context.tokenizer, config.segments)
    with context.progress("train: judging answers", len(pairs)) as done:
        return judge([answer for answer, _ in pairs], reward, progress=done)


def _answers(context: RunContext) -> list[tuple["Answer", RiskTrace | None]]:
    """The answers to imitate; those of the stage `score` with their traces."""
    import pyarrow.parquet as pq

    from ballast.pipeline.safety_layers import safety_rows
    from ballast.pipeline.training.sft_rows import Answer

    config, prompts = context.config, context.prompt_format
    if config.sft.rows == "data":
        rows = rows_with_answers(config, config.sft.data, "sft.data", config.sft.max_rows)
        rows = [*rows, *safety_rows(config, rows)]
        found: list[tuple[Answer, RiskTrace | None]] = []
        for row in rows:
            encoded = encode_answer(prompts, row, sys.maxsize)
            start = len(encoded["completion_mask"]) - sum(encoded["completion_mask"])
            ids = encoded["input_ids"]
            messages = tuple(prompts.messages(row.prompt))
            found.append((Answer(row.id, row.kind, messages, tuple(ids[:start]), tuple(ids[start:])), None))
        return found
    records = pq.read_table(context.folder.stage("score") / "scores.parquet").to_pylist()
    by_id = {f"{record['prompt_id']}/{record['sample']}": record for record in records}
    rows = [Row(row_id, record["prompt"], record["kind"]) for row_id, record in by_id.items()]
    return [_of_record(context, row, by_id[row.id]) for row in draw(rows, config.sft.max_rows, config.seed)]


def _of_record(context: RunContext, row: Row, record: dict[str, Any]) -> tuple["Answer", RiskTrace]:
    from ballast.pipeline.training.sft_rows import Answer

    prompts = context.prompt_format
    ids = tuple(prompts.encode_request(row.id, row.prompt))
    answer = Answer(row.id, row.kind, tuple(prompts.messages(row.prompt)), ids, tuple(record["token_ids"]))
    return answer, RiskTrace(tuple(record["cuts"]), tuple(record["risk"]), record["unscored_reason"])


def _write_answers(path: Path, judged: Sequence["JudgedAnswer"], star: Sequence[list[float] | None]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "id": pa.string(),
            "kind": pa.string(),
            "tokens": pa.int64(),
            "cuts": pa.list_(pa.int64()),
            "risk": pa.list_(pa.float64()),
            "unscored_reason": pa.string(),
            "star": pa.list_(pa.float64()),
        }
    )
    table = [
        {
            "id": row.answer.id,
            "kind": row.answer.kind,
            "tokens": len(row.answer.ids),
            "cuts": list(row.trace.cuts),
            "risk": list(row.trace.risk),
            "unscored_reason": row.trace.reason,
            "star": star_K,
        }
        for row, star_K in zip(judged, star, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(table, schema=schema), path)


def sft_arguments(config: RunConfig, folder: Path) -> Any:
    """TRL's arguments for a configuration."""
    import torch
    from trl import SFTConfig

    settings = config.sft
    micro, passes = micro_batch(settings.batch_size, settings.micro_batch_size, ranks.world())
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes,
        max_length=settings.max_length,
        completion_only_loss=True,
        # Autocast: the adapter's weights stay in fp32, its products run in the precision of the base.
        bf16=config.model.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=list(config.train.report_to) or "none",
        seed=config.seed,
        disable_tqdm=True,
    )
