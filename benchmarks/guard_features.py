"""Hidden states of the frozen model at every token of the training rows, run once and kept on disk.

Shape letters: T response tokens + 1 (the end of the prompt comes first), F features (layers times width).
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

LAYERS = (6, 12)
RESPONSE_TOKENS = 96  # of a response that are read: labels of whole responses say little about single late words
SHARD = 128
BATCH = 12


@dataclass
class States:
    """One row as the head sees it.

    Attributes:
        tokens: (T, F) float16, the hidden states at the end of the prompt and at each response token.
        prompt: (F,) float16, the mean over the prompt's tokens.
        ends: character offset in the response at each of the T positions; 0 first.
    """

    tokens: torch.Tensor
    prompt: torch.Tensor
    ends: list[int]


def states_of(rows: Sequence[Row], cache: Path) -> list[States]:
    """Hidden states of every row; what `cache` holds already is not run again.

    Args:
        rows: rows whose texts are valid Unicode.
        cache: folder of shards, one `.pt` for every 128 rows that were run; safe to interrupt.
    """
    keys = [_key(row) for row in rows]
    known = load_cache(cache)
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    if missing:
        known |= _run(missing, cache)
    return [known[key] for key in keys]


def load_cache(cache: Path) -> dict[str, States]:
    """Every row that the cache holds, by key."""
    known = {}
    for path in sorted(cache.glob("states-*.pt")):
        for key, value in torch.load(path, weights_only=True, mmap=True).items():
            known[key] = States(value["tokens"], value["prompt"], value["ends"].tolist())
    return known


def key_known(row: Row, known: dict[str, States]) -> bool:
    """Whether a row's states are among `known`."""
    return _key(row) in known


def _key(row: Row) -> str:
    return hashlib.sha256(repr((row.prompt, row.response, LAYERS, RESPONSE_TOKENS)).encode()).hexdigest()


def _run(rows: dict[str, Row], cache: Path) -> dict[str, States]:
    backbone, found, began, tokens = Backbone(embedded_model(), LAYERS), {}, time.perf_counter(), 0
    keys = list(rows)
    for start in range(0, len(keys), SHARD):
        part = keys[start : start + SHARD]
        encoded = {
            key: backbone.encode([{"role": "user", "content": rows[key].prompt}], rows[key].response) for key in part
        }
        length = {key: min(len(encoded[key].ids), encoded[key].prompt_length + RESPONSE_TOKENS) for key in part}
        part.sort(key=length.__getitem__)
        shard = {}
        for first in range(0, len(part), BATCH):
            batch = part[first : first + BATCH]
            for key, state in zip(
                batch, backbone.hidden([encoded[key].ids[: length[key]] for key in batch]), strict=True
            ):
                begin = encoded[key].prompt_length
                shard[key] = {
                    "tokens": state[begin - 1 :].half(),
                    "prompt": state[:begin].mean(0).half(),
                    "ends": torch.tensor([0, *encoded[key].ends[:RESPONSE_TOKENS]]),
                }
                tokens += len(state)
        torch.save(shard, cache / f"states-{part[0][:16]}.pt")
        found |= {key: States(v["tokens"], v["prompt"], v["ends"].tolist()) for key, v in shard.items()}
        print(
            f"features: {start + len(part)}/{len(keys)} rows, {tokens} tokens, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return found
