"""The table of completions: a parquet file a step, with the risk of every segment and every token's advantage."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ballast.pipeline import ranks
from ballast.pipeline.training.grpo import StepRecord

# Spelled out: a column that is all null in one step would get a type of its own, and the files would not be
# one table any more.
_COLUMNS = {
    "step": pa.int64(),
    "kind": pa.string(),
    "prompt": pa.string(),
    "completion": pa.string(),
    "token_ids": pa.list_(pa.int64()),
    "advantages": pa.list_(pa.float64()),
    "tokens_in_loss": pa.int64(),
    "cuts": pa.list_(pa.int64()),
    "risk": pa.list_(pa.float64()),
    "unscored_reason": pa.string(),
}


class CompletionsTable:
    """Writes `step-00012.parquet` files into a folder. Nothing of it is ever logged or pushed anywhere.

    Columns: step, kind, prompt (the last user message), completion, token_ids, advantages (one a token),
    tokens_in_loss (fewer than the tokens after an early stop, 0 where unscored), cuts, risk (one a cut; null where
    unscored), unscored_reason, and `reward_NAME` for every term. Processes that train together write a file a step each,
    with their own completions.

    Attributes:
        rows: completions in the table, of all processes.
        tokens: their tokens.

    Args:
        folder: where the files go.
        done: optimizer steps that a training goes on after; what the folder has of later ones is removed, for they are made
            again.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        self.folder = folder
        self.rows = 0
        self.tokens = 0
        ranks.on_main(lambda: self._make(done))
        kept = sorted(folder.glob("step-*.parquet"))
        for part in kept:
            ids = pq.read_table(part, columns=["token_ids"]).column("token_ids")
            self._count([len(ids), pc.sum(pc.list_value_length(ids)).as_py()])
        self._part = itertools.count(len(kept) + ranks.rank(), ranks.world())

    def _make(self, done: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob("step-*.parquet"):
            if int(part.name.split("-")[1]) >= done:
                part.unlink()

    def _count(self, more: Sequence[float]) -> None:
        self.rows, self.tokens = self.rows + int(more[0]), self.tokens + int(more[1])

    def write(self, record: StepRecord) -> None:
        """Append the completions of one batch."""
        scored = record.scored
        rows = [
            {
                "step": record.step,
                "kind": record.kinds[n],
                "prompt": record.prompts[n] if isinstance(record.prompts[n], str) else record.prompts[n][-1]["content"],
                "completion": scored.texts[n],
                "token_ids": list(record.completion_ids[n]),
                "advantages": record.advantage_NT[n, : len(record.completion_ids[n])].tolist(),
                "tokens_in_loss": int(record.in_loss_NT[n].sum()),
                "cuts": list(scored.traces[n].cuts),
                "risk": list(scored.traces[n].risk),
                "unscored_reason": scored.traces[n].reason,
                **{f"reward_{name}": values[n] for name, values in record.rewards.items()},
            }
            for n in range(len(scored.texts))
        ]
        schema = pa.schema([*_COLUMNS.items(), *((f"reward_{name}", pa.float64()) for name in record.rewards)])
        part = self.folder / f"step-{record.step:05d}-{next(self._part):03d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), part)
        self._count(ranks.summed([len(rows), sum(len(ids) for ids in record.completion_ids)]))
