"""States of the frozen lower blocks at every token of the training rows, run once and kept on disk.

The blocks up to `LOWER` are never trained, so that their output is the same in every pass: only what lies above
is run again. Shape letters: T tokens of prompt and response, D width of the model.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from guard_data import Row

from ballast.guardrails.heads.backbone import Backbone
from ballast.models import embedded_model

LOWER = 10
PROMPT_TOKENS = 320  # of a rendered prompt, its end; longer ones lose their beginning
RESPONSE_TOKENS = 160  # of a response that are read: labels of whole responses say little about single late words
SHARD = 256
BATCH = 16


@dataclass
class States:
    """One row as the upper blocks see it.

    Attributes:
        tokens: (T, D) bfloat16, the output of block `LOWER` at every token of prompt and response.
        prompt_length: how many of the T tokens belong to the rendered prompt.
        ends: character offset in the response at the end of the prompt (0) and after each response token.
    """

    tokens: torch.Tensor
    prompt_length: int
    ends: list[int]


def states_of(rows: Sequence[Row], cache: Path) -> list[States]:
    """States of every row; what `cache` holds already is not run again.

    Args:
        rows: rows whose texts are valid Unicode.
        cache: folder of shards, one `.pt` for every 256 rows that were run; safe to interrupt.
    """
    keys = [_key(row) for row in rows]
    known = _load(cache)
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    if missing:
        known |= _run(missing, cache)
    return [known[key] for key in keys]


def _load(cache: Path) -> dict[str, States]:
    known = {}
    for path in sorted(cache.glob("lower-*.pt")):
        for key, value in torch.load(path, weights_only=True).items():
            known[key] = States(value["tokens"], value["prompt_length"], value["ends"].tolist())
    return known


def _key(row: Row) -> str:
    read = (row.prompt, row.response, LOWER, PROMPT_TOKENS, RESPONSE_TOKENS)
    return hashlib.sha256(repr(read).encode()).hexdigest()


def _run(rows: dict[str, Row], cache: Path) -> dict[str, States]:
    backbone, found, began, tokens = Backbone(embedded_model(), (LOWER,)), dict[str, States](), time.perf_counter(), 0
    encoded = {}
    for key, row in rows.items():
        whole = backbone.encode([{"role": "user", "content": row.prompt}], row.response)
        skipped = max(0, whole.prompt_length - PROMPT_TOKENS)
        encoded[key] = (
            whole.ids[skipped : whole.prompt_length + RESPONSE_TOKENS],
            whole.prompt_length - skipped,
            [0, *whole.ends[:RESPONSE_TOKENS]],
        )
    order = sorted(rows, key=lambda key: len(encoded[key][0]))
    for start in range(0, len(order), SHARD):
        part, shard = order[start : start + SHARD], {}
        for first in range(0, len(part), BATCH):
            batch = part[first : first + BATCH]
            for key, state in zip(batch, backbone.hidden([encoded[key][0] for key in batch]), strict=True):
                found[key] = States(state.bfloat16(), *encoded[key][1:])
                shard[key] = {
                    "tokens": found[key].tokens,
                    "prompt_length": found[key].prompt_length,
                    "ends": torch.tensor(found[key].ends),
                }
                tokens += len(state)
        torch.save(shard, cache / f"lower-{part[0][:16]}.pt")
        seconds = time.perf_counter() - began
        print(f"lower blocks: {start + len(part)}/{len(order)} rows, {tokens} tokens, {seconds:.0f} s", flush=True)
    return found
