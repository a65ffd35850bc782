"""rollout: completions of the training prompts by the reference model, offline, for scoring and for inspection.

Writes `rollouts.parquet`: prompt_id, kind, sample, prompt, completion, token_ids, truncated.
"""

from pathlib import Path

from ballast.pipeline.context import RunContext
from ballast.pipeline.data import training_rows


def run_stage(context: RunContext, folder: Path) -> None:
    """Sample every training prompt."""
    import pyarrow as pa
    import pyarrow.parquet as pq

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
    pq.write_table(pa.Table.from_pylist(table), folder / "rollouts.parquet")
