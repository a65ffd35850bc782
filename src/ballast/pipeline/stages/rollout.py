"""rollout: completions of the training prompts by the reference model, offline, for scoring and for inspection.

Writes `rollouts.parquet`, whose columns are `ROLLOUTS` of `table_schemas`.
"""

from pathlib import Path

from ballast.pipeline.context import RunContext
from ballast.pipeline.data import training_rows
from ballast.pipeline.table_schemas import ROLLOUTS, write_table


def run_stage(context: RunContext, folder: Path) -> None:
    """Sample every training prompt."""
    config = context.config
    prompts, samples = training_rows(config.data, config.seed), range(config.rollout.samples)
    encoded = context.encode_prompts(prompts, config.rollout.sampling)
    rows = [row for row in prompts for _ in samples]
    ids = [of_prompt for of_prompt in encoded for _ in samples]
    generator = context.generator(context.reference_model)
    with context.progress("rollout: answering", len(rows)) as done:
        answers = generator.generate(ids, config.rollout.sampling, config.seed, done)
    table = [
        {
            "prompt_id": row.id,
            "kind": row.kind,
            "sample": i % config.rollout.samples,
            "prompt": row.prompt,
            "completion": answer.text,
            "token_ids": list(answer.ids),
            "truncated": answer.truncated,
        }
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True))
    ]
    write_table(folder / "rollouts.parquet", table, ROLLOUTS)
