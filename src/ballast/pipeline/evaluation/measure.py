"""Measuring one model on the test prompts: generate, judge, and write both down."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ballast.pipeline.data import held_out_suite
from ballast.pipeline.evaluation.answer_table import write_answers
from ballast.pipeline.evaluation.judges import Completion, Verdict, answer_to, judge_completions
from ballast.pipeline.evaluation.metrics import EvaluationSummary, summarize
from ballast.pipeline.evaluation.probes import run_probes
from ballast.pipeline.evaluation.suites import SuitePrompt
from ballast.pipeline.evaluation.task_figures import TaskScores
from ballast.pipeline.evaluation.tasks import TaskMeasure
from ballast.pipeline.evaluation.truthfulqa import truthfulqa_figures, truthfulqa_questions
from ballast.pipeline.run_folder import write_text
from ballast.rewards.outage import stop_above_limit

if TYPE_CHECKING:
    from ballast.pipeline.context import RunContext
    from ballast.pipeline.generation import Generated


def measure_model(
    context: "RunContext",
    model: str,
    folder: Path,
    label: str,
    training_tokens_per_s: float | None = None,
    further: bool = False,
) -> EvaluationSummary:
    """Generate answers to the test prompts with `model`, judge them, and write `LABEL.json` and `LABEL.parquet`.

    Row i of two models' answers has the same prompt, sample number and seed, so that they can be compared in
    pairs.

    Args:
        context: the run.
        model: folder or hub id of the policy's architecture.
        folder: where the two files go.
        label: their name: start, aligned, final.
        training_tokens_per_s: for the table.
        further: measure what takes answers of its own, too: the probes for cheats and TruthfulQA, where they are on.

    Raises:
        ConfigError: a task reward that does not exist; nothing has been generated then, nor in the next case.
        DataError: a prompt that cannot be given to the model, or an answer in the data that a task cannot read.
        GuardError: guard or a judge left more than `train.max_unscored_share` unscored; the table of answers is written
            first, with the reasons.
    """
    config, tasks = context.config, TaskMeasure(context)
    questions = truthfulqa_questions(config.evaluate) if further else []
    prompts = held_out_suite(config.data).prompts
    completions, answers, tokens_per_s = _answer(context, model, prompts, label)
    with context.console.status(f"{label}: judging"):
        verdicts = judge_completions(
            completions, context.judge, threshold=config.evaluate.threshold, second=context.second_judge
        )
        task = tasks.score(completions, [answer.ids for answer in answers])
        guard_risk, reward, guard_reason = _rewards(context, completions, answers, task)
    write_answers(folder / f"{label}.parquet", completions, verdicts, guard_risk, reward, task)
    _stop_above_limit(context, label, completions, verdicts, guard_risk, guard_reason)
    summary = summarize(
        verdicts,
        guard_risk,
        reward,
        config.seed,
        config.evaluate.interval,
        tokens_per_s,
        training_tokens_per_s,
        task,
        config.evaluate.threshold,
        config.evaluate.pass_at or (),
    )
    if further:
        ordinary = summary.refusal_ordinary
        generator = context.generator(model)
        summary = replace(
            summary,
            truthfulqa=truthfulqa_figures(context, generator, questions, folder, label),
            probes=run_probes(context, generator, prompts, completions, verdicts, ordinary, folder, label),
        )
    write_text(folder / f"{label}.json", summary.to_json())
    context.folder.log({"event": "measured", "model": label, **json.loads(summary.to_json())})
    return summary


def _answer(
    context: "RunContext", model: str, prompts: Sequence[SuitePrompt], label: str
) -> "tuple[list[Completion], list[Generated], float]":
    """The answers of a model, `evaluate.samples` to each prompt, as texts and as tokens; and how many tokens a second."""
    config, samples = context.config.evaluate, range(context.config.evaluate.samples)
    encoded = context.encode_prompts(prompts, config.sampling, serving=True)
    ids = [of_prompt for of_prompt in encoded for _ in samples]
    generator = context.generator(model)
    started = time.perf_counter()
    with context.progress(f"{label}: answering", len(ids)) as done:
        answers = generator.generate(ids, config.sampling, context.config.seed, done)
    seconds = time.perf_counter() - started
    tokens_per_s = sum(len(answer.ids) for answer in answers) / seconds
    context.say(f"  {label}: {len(answers)} answers in {seconds:.0f} s, {tokens_per_s:,.0f} tokens/s")
    asked = ((prompt, sample) for prompt in prompts for sample in samples)
    completions = [
        answer_to(prompt, answer.text, answer.truncated, sample)
        for (prompt, sample), answer in zip(asked, answers, strict=True)
    ]
    return completions, answers, tokens_per_s


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts of a measured model, from its parquet table."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    # A table from before a field was measured lacks its column.
    names = [name for name in Verdict.__dataclass_fields__ if name in table.column_names]
    return [Verdict(**row) for row in table.select(names).to_pylist()]


def _stop_above_limit(
    context: "RunContext",
    label: str,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    guard_risk: Sequence[float | None],
    guard_reason: str | None,
) -> None:
    limit, where = context.config.train.max_unscored_share, f"among the test answers of model '{label}'"
    unscored = sum(risk is None for risk in guard_risk)
    stop_above_limit(unscored, len(guard_risk), limit, context.guard.name, guard_reason, where)
    # The judge is not asked about an empty answer, so that is no failure of the judge.
    asked = [verdict for verdict, c in zip(verdicts, completions, strict=True) if c.text.strip()]
    failed = [verdict.reason for verdict in asked if verdict.risk is None]
    stop_above_limit(len(failed), len(asked), limit, context.judge.name, failed[0] if failed else None, where)
    if context.second_judge is not None:
        failed = [verdict.second_reason for verdict in asked if verdict.second_risk is None]
        stop_above_limit(
            len(failed), len(asked), limit, context.second_judge.name, failed[0] if failed else None, where
        )


def _rewards(
    context: "RunContext",
    completions: Sequence[Completion],
    answers: "Sequence[Generated]",
    task: Mapping[str, TaskScores],
) -> tuple[list[float | None], list[float | None], str | None]:
    """The rewarding guard's risk of every answer, the weighted mean of the configured reward terms, and why the
    first unscored answer is unscored.
    """
    from ballast.rewards.guard_reward import GuardReward
    from ballast.rewards.terms import CoherenceReward, RefusalReward

    config, ids = context.config, [answer.ids for answer in answers]
    scored = GuardReward(context.guard, context.tokenizer, config.segments, config.shaping.clean_trace).score(
        # The conversation as it was, system message included.
        [context.serving_format.messages(c.prompt) for c in completions],
        ids,
    )
    star = [None if value != value else value for value in scored.lowest_star_N.tolist()]
    reason = next((trace.reason for trace, s in zip(scored.traces, star, strict=True) if s is None), None)
    refusal = RefusalReward(context.tokenizer, config.rewards.over_refusal)(
        completion_ids=ids, kind=[c.kind for c in completions]
    )
    fluent = CoherenceReward(context.tokenizer)(completion_ids=ids)
    star_on_harmful = [s if c.kind == "harmful" else None for s, c in zip(star, completions, strict=True)]
    terms = [
        (config.rewards.star, star_on_harmful),
        (config.rewards.refusal, refusal),
        (config.rewards.coherence, fluent),
        *((scores.weight, scores.values) for scores in task.values()),
    ]
    rewards: list[float | None] = []
    for row, judged in enumerate(star):
        applied = [(weight, value) for weight, values in terms if (value := values[row]) is not None]
        total = sum(weight for weight, _ in applied)
        # What the guard could not judge is unscored, not zero.
        unscored = judged is None or not total
        rewards.append(None if unscored else sum(weight * value for weight, value in applied) / total)
    return [None if s is None else 1.0 - s for s in star], rewards, reason
