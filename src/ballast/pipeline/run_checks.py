"""What can be refused before the first stage of a call starts: parts that do not exist, and rows that cannot be used."""

from collections.abc import Sequence

from rich.markup import escape

from ballast.guardrails.registry import licence_of
from ballast.pipeline.context import RunContext
from ballast.pipeline.stage_graph import stage_of


def check_parts(context: RunContext, names: Sequence[str]) -> None:
    """Whatever the stages to come load by name exists; a guard's weights are loaded at its first use, not here.

    Raises:
        ConfigError: a guard or a reward function does not exist, or does not take its options; there is no alignment to
            restore, or not the device for it.
        DataError: a training row lacks the answer that a task reward compares with, or rows cannot be used for what they are for.
        GuardError: a plug-in cannot be loaded.
    """
    read = {key for name in names for key in stage_of(context.config, name).reads}
    parts = [part for part in ("guard", "judge") if part in read]
    for part in [*parts, *(["second_judge"] if "judge" in parts else [])]:
        getattr(context, part)  # made, and kept, when it is asked for
    if {"baseline", "evaluate"} & set(names):
        from ballast.pipeline.evaluation.truthfulqa import truthfulqa_questions

        truthfulqa_questions(context.config.evaluate)
    if "train" in names:
        _warn_of_licence(context)
        if context.config.train.method == "grpo":
            _check_rewards(context)
        _check_safety_parts(context)
    if "prompts" in names:
        from ballast.pipeline.evaluation.system_prompts import candidate_prompts
        from ballast.pipeline.stages.prompts import check_suite

        candidate_prompts(context.config)
        check_suite(context.config)
    if "restore" in names:
        from ballast.pipeline.stages.restore import check_settings

        check_settings(context.config)


def _check_rewards(context: RunContext) -> None:
    """Reward functions can be imported, and every row has what they read."""
    from ballast.pipeline.data import training_rows
    from ballast.pipeline.task_rewards import columns_read, refusal_detector, task_rewards
    from ballast.rewards.terms import load_reward_function

    config = context.config
    for path in config.train.reward_functions:
        load_reward_function(path)
    task_rewards(config.rewards.task, tokenizer=None)
    refusal_detector(config.rewards, config.train)
    if columns := columns_read(config.rewards.task):
        training_rows(config.data, config.seed, columns)


def _check_safety_parts(context: RunContext) -> None:
    """The monitor's judge, and its rows and those of the safe updates that are on: there, and on the right side of the split."""
    config = context.config
    if config.monitor.enabled:
        from ballast.pipeline.monitoring.of_run import monitor_judge, monitor_suite

        monitor_judge(context)
        monitor_suite(config)
    if config.safegrad.enabled:
        from ballast.pipeline.safe_updates import safegrad_rows

        safegrad_rows(config)
    if config.probing.enabled:
        from ballast.pipeline.safety_layers import preference_rows

        preference_rows(config)
    if config.regularization.safety_share > 0:
        from ballast.pipeline.safety_layers import safety_rows
        from ballast.pipeline.stages.align import rows_with_answers

        safety_rows(config, rows_with_answers(config, config.sft.data, "sft.data", config.sft.max_rows))


def _warn_of_licence(context: RunContext) -> None:
    options = context.config.guard
    licence = licence_of(options)
    if licence.as_reward == "no":
        guard = escape(str(getattr(options, "model", options.type)))
        context.say(
            f"[yellow]warning: the guard '{guard}' is under the licence {licence.name}: {licence.note}. Training under it does "
            "that; take another guard (`ballast guard list --models`), or ask a lawyer[/]"
        )
