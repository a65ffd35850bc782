"""train: GRPO with advantages that the guardrail shapes token by token.

TRL samples completions through vLLM (the run's one engine), the guard judges every segment in one call, the
scores become `(N, T)` advantages, and TRL's loss learns from them, in a LoRA on the aligned model.

Writes `adapter/`, `model/` (merged), `completions/` (a parquet file a step, with the risk of every segment
and the advantage of every token) and `training.json`. Killed, it goes on from its last checkpoint, where
`train.checkpoint_every` makes some.
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ballast.errors import BallastError, DataError
from ballast.pipeline import ranks
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_inputs import VLLMGeneration
from ballast.pipeline.context import RunContext, check_one_device, load_policy
from ballast.pipeline.data import Row, interleave, training_rows
from ballast.pipeline.launching import micro_batch
from ballast.pipeline.model_card import CARD
from ballast.pipeline.model_record import check_record
from ballast.pipeline.run_card import write_run_card
from ballast.pipeline.stages.align import quiet
from ballast.pipeline.task_rewards import columns_read, refusal_detector, task_rewards

if TYPE_CHECKING:
    from ballast.pipeline.training.completions import CompletionsTable


def run_stage(context: RunContext, folder: Path) -> None:
    """Train the adapter, then write adapter, merged model and completions."""
    from ballast.pipeline.checkpoints.resumable import ResumableTraining
    from ballast.pipeline.monitoring.of_run import monitored
    from ballast.pipeline.training.completions import CompletionsTable

    check_one_device()
    config = context.config
    check_record(Path(context.reference_model), context.prompt_format)
    training = ResumableTraining(context, folder)
    table = CompletionsTable(folder / "completions", done=training.step)
    trainer = shaped_trainer(context, folder, table)
    quiet(trainer)
    monitor = monitored(context, trainer, folder, training.store)
    context.forget_weights()
    with context.live("train"):
        seconds = training.train(trainer)
    if monitor is None or not monitor.stopped:
        check_all_steps_done(trainer.state.global_step, config.train.steps)
    record = {
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "tokens_per_s": table.tokens / seconds,
        "completions": table.rows,
    }
    ranks.on_main(lambda: write_trained(context, trainer, folder, record))


def write_trained(context: RunContext, trainer: Any, folder: Path, record: dict[str, Any]) -> None:
    """What a training leaves: adapter, merged model, their cards, and training.json with the record."""
    from ballast.pipeline.training.merge import save_merged

    trainer.model.save_pretrained(folder / "adapter")
    (folder / "adapter" / CARD).unlink(missing_ok=True)  # PEFT's form to be filled in
    save_merged(trainer.model, context.tokenizer, context.prompt_format, folder / "model")
    for made in ("adapter", "model"):
        write_run_card(context, folder / made, "train")
    (folder / "training.json").write_text(json.dumps(record))


def shaped_trainer(context: RunContext, folder: Path, table: "CompletionsTable") -> Any:
    """The run's `ShapedGRPOTrainer`, on a LoRA over the reference model; each batch is written to `table`.

    Raises:
        DataError: see `training_prompts`.
    """
    from datasets import Dataset

    from ballast.pipeline.safe_updates import safegrad_callbacks
    from ballast.pipeline.safety_layers import adapter, callbacks_after, callbacks_before, trainer_with
    from ballast.pipeline.training.callbacks import MetricsCallback
    from ballast.pipeline.training.grpo import ShapedGRPOTrainer
    from ballast.pipeline.training.weight_sync import shared_engine
    from ballast.rewards.guard_reward import GuardReward
    from ballast.rewards.terms import load_reward_function

    config, tokenizer = context.config, context.tokenizer
    rows = training_prompts(context)
    dataset = Dataset.from_list(
        [
            {"prompt": context.prompt_format.messages(r.prompt), "kind": r.kind, "prompt_id": r.id, **r.columns}
            for r in rows
        ]
    )
    user_rewards = [load_reward_function(path) for path in config.train.reward_functions]
    policy = load_policy(context.reference_model, config.model.dtype)
    colocated = isinstance(config.generation, VLLMGeneration)
    with shared_engine(context.engine) if colocated else nullcontext():
        trainer_class, safe = trainer_with(context, ShapedGRPOTrainer)
        return trainer_class(
            model=policy,
            args=grpo_arguments(config, folder / "trainer", n_user_rewards=len(user_rewards)),
            guard_reward=GuardReward(context.guard, tokenizer, config.segments, config.shaping.clean_trace),
            reward_funcs=[*own_rewards(config, tokenizer), *user_rewards],
            **shaping_options(config),
            prompt_format=context.prompt_format,
            on_batch=table.write,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=adapter(context, policy, config.train.lora),
            callbacks=[
                *callbacks_before(config),
                *safegrad_callbacks(context),
                *callbacks_after(config),
                MetricsCallback(context, "train"),
            ],
            **safe,
        )


def own_rewards(config: RunConfig, tokenizer: Any) -> list[Any]:
    """The reward terms beside the guard's: refusal, coherence, and the tasks that the configuration names."""
    from ballast.rewards.terms import CoherenceReward, RefusalReward

    return [
        RefusalReward(tokenizer, config.rewards.over_refusal, refusal_detector(config.rewards, config.train)),
        CoherenceReward(tokenizer),
        *task_rewards(config.rewards.task, tokenizer),
    ]


def shaping_options(config: RunConfig) -> dict[str, Any]:
    """What `ShapedGRPOTrainer` is told of shaping, normalising and the limit of unscored rows."""
    rewards = config.rewards
    return {
        "shaping": config.shaping,
        "over_batch": ("refusal",) if rewards.refusal_baseline == "batch" else (),
        "opening": {} if rewards.refusal_opening is None else {"refusal": rewards.refusal_opening},
        "std_floor": rewards.std_floor,
        "star_std_floor": rewards.star_std_floor,
        "max_unscored_share": config.train.max_unscored_share,
    }


def training_prompts(context: RunContext) -> list[Row]:
    """The prompts to train on, each of which can be given to the model, and enough of them for a step.

    Raises:
        DataError: too few prompts, one that is measured on too, or one that cannot be given to the model.
    """
    config, needed = context.config, context.config.train.prompts_per_step
    rows = interleave(training_rows(config.data, config.seed, columns_read(config.rewards.task)), config.seed)
    if len(rows) < needed:
        raise DataError(
            f"{len(rows)} training prompts are fewer than train.prompts_per_step = {needed}, so not one step could be made; "
            f"lower train.prompts_per_step to {len(rows)} or give more prompts by data.train or data.max_train"
        )
    context.encode_prompts(rows, config.train.sampling)
    return rows


def check_all_steps_done(done: int, steps: int) -> None:
    """TRL ends without an error where its sampler runs dry; a shorter training is not the one that was asked for.

    Raises:
        BallastError: fewer or more optimizer steps were made than `train.steps`.
    """
    if done != steps:
        raise BallastError(
            f"training ended after {done} of train.steps = {steps} steps, so its model is not the configured one and is not kept; "
            "look at the last lines of metrics.jsonl for the reason, and run again with --resume"
        )


def grpo_arguments(config: RunConfig, folder: Path, n_user_rewards: int = 0) -> Any:
    """TRL's arguments for a configuration."""
    import torch
    from trl import GRPOConfig

    settings = config.train
    completions = settings.prompts_per_step * settings.group_size
    micro, passes = micro_batch(completions, settings.micro_batch_size, ranks.world())
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes,
        num_generations=settings.group_size,
        max_completion_length=settings.sampling.max_new_tokens,
        temperature=settings.sampling.temperature,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear" if settings.schedule == "linear" else "constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        beta=settings.beta,
        loss_type=settings.loss_type,
        # cispo clips the ratio itself from above; the default meant for the others would cap it at 0.2.
        epsilon_high=5.0 if settings.loss_type == "cispo" else None,
        reward_weights=[
            *(config.rewards.star, config.rewards.refusal, config.rewards.coherence),
            *(term.weight for term in config.rewards.task),
            *[1.0] * n_user_rewards,
        ],
        use_vllm=isinstance(config.generation, VLLMGeneration),
        vllm_mode="colocate",
        vllm_importance_sampling_correction=settings.importance_sampling,
        # The default drops whole sequences by the sum of their log-prob differences.
        vllm_importance_sampling_mode="token_truncate",
        # Autocast: the adapter's weights stay in fp32, its products run in the precision of the base.
        bf16=config.model.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        shuffle_dataset=False,  # the rows come in an order of our own, see `interleave`
        logging_steps=1,
        log_completions=False,
        save_strategy="no",
        report_to=list(settings.report_to) or "none",
        seed=config.seed,
        disable_tqdm=True,
    )
