"""score: the guard's risk at every cut of every rollout.

Writes `scores.parquet`, whose columns are `SCORES` of `table_schemas`. Stops where more is unscored than
`train.max_unscored_share`.
"""

from pathlib import Path

from ballast.pipeline.context import RunContext
from ballast.pipeline.table_schemas import SCORES, write_table
from ballast.rewards.outage import stop_above_limit

_BATCH = 64


def run_stage(context: RunContext, folder: Path) -> None:
    """Score the rollouts in batches."""
    import pyarrow.parquet as pq

    from ballast.rewards.guard_reward import GuardReward

    config = context.config
    rows = pq.read_table(context.folder.stage("rollout") / "rollouts.parquet").to_pylist()
    reward = GuardReward(context.guard, context.tokenizer, config.segments, config.shaping.clean_trace)
    table = []
    with context.progress("score: judging", len(rows)) as done:
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            prompts = [context.prompt_format.messages(row["prompt"]) for row in batch]
            scored = reward.score(prompts, [row["token_ids"] for row in batch])
            for row, trace, star in zip(batch, scored.traces, scored.lowest_star_N.tolist(), strict=True):
                judged = {"cuts": list(trace.cuts), "risk": list(trace.risk), "unscored_reason": trace.reason}
                table.append({**row, **judged, "lowest_star": None if star != star else star})
            done(len(batch))
    unscored = [row for row in table if row["lowest_star"] is None]
    context.say(f"  {len(table)} completions scored, {len(unscored)} unscored")
    write_table(folder / "scores.parquet", table, SCORES)
    reason = unscored[0]["unscored_reason"] if unscored else None
    limit = config.train.max_unscored_share
    stop_above_limit(len(unscored), len(table), limit, context.guard.name, reason, "among the rollouts")
