"""Measuring one model on the test prompts: generate, judge, and write both down."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ballast.pipeline.data import held_out_suite
from ballast.pipeline.evaluation.judges import Completion, Verdict, judge_completions
from ballast.pipeline.evaluation.metrics import EvaluationSummary, TaskScores, summarize
from ballast.pipeline.evaluation.tasks import TaskMeasure
from ballast.pipeline.run_folder import write_text
from ballast.rewards.outage import stop_above_limit

if TYPE_CHECKING:
    from ballast.pipeline.context import RunContext
    from ballast.pipeline.generation import Generated


def measure_model(
    context: "RunContext", model: str, folder: Path, label: str, training_tokens_per_s: float | None = None
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

    Raises:
        ConfigError: a task reward that does not exist; nothing has been generated then, nor in the next case.
        DataError: a prompt that cannot be given to the model, or an answer in the data that a task cannot read.
        GuardError: guard or judge left more than `train.max_unscored_share` unscored; the table of answers is written
            first, with the reasons.
    """
    config, tasks = context.config, TaskMeasure(context)
    suite, samples = held_out_suite(config.data), range(config.evaluate.samples)
    encoded = context.encode_prompts(suite.prompts, config.evaluate.sampling, serving=True)
    prompts = [prompt for prompt in suite.prompts for _ in samples]
    ids = [of_prompt for of_prompt in encoded for _ in samples]
    generator = context.generator(model)
    started = time.perf_counter()
    with context.progress(f"{label}: answering", len(ids)) as done:
        answers = generator.generate(ids, config.evaluate.sampling, config.seed, done)
    seconds = time.perf_counter() - started
    tokens_per_s = sum(len(answer.ids) for answer in answers) / seconds
    context.say(f"  {label}: {len(answers)} answers in {seconds:.0f} s, {tokens_per_s:,.0f} tokens/s")
    completions = [
        Completion(prompt.id, prompt.prompt, prompt.kind, answer.text, answer.truncated, i % config.evaluate.samples)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    with context.console.status(f"{label}: judging"):
        verdicts = judge_completions(completions, context.judge, threshold=config.evaluate.threshold)
        task = tasks.score(completions, [answer.ids for answer in answers])
        guard_risk, reward, guard_reason = _rewards(context, completions, answers, task)
    _write_rows(folder / f"{label}.parquet", completions, verdicts, guard_risk, reward, task)
    _stop_above_limit(context, label, completions, verdicts, guard_risk, guard_reason)
    summary = summarize(
        verdicts, guard_risk, reward, config.seed, config.evaluate.interval, tokens_per_s, training_tokens_per_s, task
    )
    write_text(folder / f"{label}.json", summary.to_json())
    context.folder.log({"event": "measured", "model": label, **json.loads(summary.to_json())})
    return summary


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts of a measured model, from its parquet table."""
    import pyarrow.parquet as pq

    fields = Verdict.__dataclass_fields__
    return [Verdict(**{name: row[name] for name in fields}) for row in pq.read_table(path).to_pylist()]


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
    failed = [verdict for verdict in asked if verdict.risk is None]
    reason = failed[0].reason if failed else None
    stop_above_limit(len(failed), len(asked), limit, context.judge.name, reason, where)


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


def _write_rows(
    path: Path,
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    guard_risk: Sequence[float | None],
    reward: Sequence[float | None],
    task: Mapping[str, TaskScores],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            **asdict(verdict),
            "prompt": completion.prompt,
            "completion": completion.text,
            "guard_risk": risk,
            "reward": value,
            **{f"reward_{name}": scores.values[row] for name, scores in task.items()},
        }
        for row, (completion, verdict, risk, value) in enumerate(
            zip(completions, verdicts, guard_risk, reward, strict=True)
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
