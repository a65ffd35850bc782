"""Fitting of the embedded guard: a head on hidden states of the frozen model.

Shape letters: M training positions (a response at one cut), F features of the frozen model, H hidden units.
"""

import hashlib
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from guard_data import Row
from guard_rows import calibrate, certainty, label_at, row_weights

from ballast.guardrails.heads.backbone import Backbone
from ballast.guardrails.heads.embedded import RiskHead
from ballast.models import embedded_model

LAYERS = (8, 12, 16, 20, 24)
POSITIONS = 6
CANDIDATES = [((12, 20), 64, 0.5), ((12, 20), 64, 2.0), ((12, 20), 64, 5.0), ((16, 20), 64, 2.0)]


@dataclass
class Features:
    """Hidden states at training positions: `now`, `average`, `prompt` (M, F) in float16; the rest (M,)."""

    now: torch.Tensor
    average: torch.Tensor
    prompt: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    dev: torch.Tensor


def embedded_features(rows: list[Row], cache: Path, seed: int) -> Features:
    """Features of every row at `POSITIONS` tokens (its last one among them); rows in `cache` are not run again."""
    path = cache / "features.pt"
    known: dict[str, dict[str, torch.Tensor]] = torch.load(path, weights_only=True) if path.is_file() else {}
    keys = [
        hashlib.sha256(repr((row.prompt, row.response, LAYERS, POSITIONS, seed)).encode()).hexdigest() for row in rows
    ]
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    if missing:
        known |= _run_backbone(missing)
        torch.save(known, path)
    weights = row_weights(rows)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in Features.__dataclass_fields__}
    for key, row, weight in zip(keys, rows, weights, strict=True):
        cuts = known[key]["cuts"].tolist()
        for name in ("now", "average"):
            parts[name].append(known[key][name])
        parts["prompt"].append(known[key]["prompt"].expand(len(cuts), -1))
        parts["label"].append(torch.tensor([label_at(row, cut) for cut in cuts]))
        parts["weight"].append(torch.tensor([weight * certainty(row, cut) for cut in cuts], dtype=torch.float32))
        parts["dev"].append(torch.full((len(cuts),), row.part == "dev"))
    return Features(**{name: torch.cat(values) for name, values in parts.items()})


def _run_backbone(rows: dict[str, Row]) -> dict[str, dict[str, torch.Tensor]]:
    backbone, found = Backbone(embedded_model(), LAYERS), {}
    encoded = {
        key: backbone.encode([{"role": "user", "content": row.prompt}], row.response) for key, row in rows.items()
    }
    order = sorted(rows, key=lambda key: len(encoded[key].ids))
    for start in range(0, len(order), 16):
        batch = order[start : start + 16]
        for key, state in zip(batch, backbone.hidden([encoded[key].ids for key in batch]), strict=True):
            x, rng = state[encoded[key].prompt_length - 1 :], random.Random(key)
            chosen = sorted({len(x) - 1, *(rng.randrange(len(x)) for _ in range(POSITIONS - 1))})
            mean = x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]
            found[key] = {
                "now": x[chosen].half(), "average": mean[chosen].half(), "prompt": x[:1].half().clone(),
                "cuts": torch.tensor([0, *encoded[key].ends])[chosen],
            }  # fmt: skip
        if start % 320 == 0:
            print(f"features: {start}/{len(order)} rows", flush=True)
    return found


def fit_head(features: Features, seed: int) -> tuple[RiskHead, dict[str, Any]]:
    """The best of a few heads by weighted cross-entropy on the dev part, then calibrated there."""
    best: tuple[float, RiskHead, dict[str, Any]] | None = None
    tried = []
    for layers, hidden, decay in CANDIDATES:
        head, loss, epoch = _train_head(features, layers, hidden, decay, seed)
        tried.append(
            {"layers": layers, "hidden": hidden, "weight_decay": decay, "epochs": epoch, "dev_loss": round(loss, 4)}
        )
        print(tried[-1], flush=True)
        if best is None or loss < best[0]:
            best = (loss, head, tried[-1])
    assert best is not None
    return best[1], {**best[2], "tried": tried}


def _select(features: Features, layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    width = features.now.shape[1] // len(LAYERS)
    columns = torch.cat([torch.arange(width) + LAYERS.index(layer) * width for layer in layers])
    return {name: getattr(features, name)[:, columns].float() for name in ("now", "average", "prompt")}


def _train_head(
    features: Features, layers: tuple[int, ...], hidden: int, decay: float, seed: int, epochs: int = 14
) -> tuple[RiskHead, float, int]:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    views, fit, dev = _select(features, layers), ~features.dev, features.dev
    mean, scale = views["now"][fit].mean(0), views["now"][fit].std(0) + 1e-3
    views = {name: (value - mean) / scale for name, value in views.items()}
    x = torch.cat(list(views.values()), dim=1)
    first = torch.nn.Linear(x.shape[1], hidden)
    last = torch.nn.Linear(hidden, 1)
    optimiser = torch.optim.AdamW([*first.parameters(), *last.parameters()], lr=5e-4, weight_decay=decay)
    index = fit.nonzero()[:, 0]
    steps = epochs * math.ceil(len(index) / 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)

    def loss_of(rows: torch.Tensor, drop: float) -> torch.Tensor:
        inputs = torch.nn.functional.dropout(x[rows], drop, training=drop > 0)
        hiddens = torch.nn.functional.dropout(torch.nn.functional.gelu(first(inputs)), drop, training=drop > 0)
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            last(hiddens)[:, 0], features.label[rows], reduction="none"
        )
        return (each * features.weight[rows]).sum() / features.weight[rows].sum()

    best = (math.inf, 0, {})
    dev_index = dev.nonzero()[:, 0]
    for epoch in range(1, epochs + 1):
        for rows in index[torch.randperm(len(index), generator=generator)].split(256):
            optimiser.zero_grad()
            loss_of(rows, 0.2).backward()
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            loss = float(loss_of(dev_index, 0.0))
        if loss < best[0]:
            now, average, prompt = first.weight.detach().clone().chunk(3, dim=1)
            best = (
                loss,
                epoch,
                {
                    "now": now,
                    "average": average,
                    "prompt": prompt,
                    "bias": first.bias.detach().clone(),
                    "out": last.weight.detach()[0].clone(),
                    "out_bias": last.bias.detach().clone(),
                },
            )
    tensors = {"mean": mean, "scale": scale, **best[2]}
    with torch.no_grad():
        hiddens = torch.nn.functional.gelu(
            x[dev_index] @ torch.cat([tensors["now"], tensors["average"], tensors["prompt"]], 1).T + tensors["bias"]
        )
        logit = (hiddens @ tensors["out"] + tensors["out_bias"]).numpy()
    slope, offset = calibrate(logit, features.label[dev_index].numpy(), features.weight[dev_index].numpy())
    tensors["out"], tensors["out_bias"] = tensors["out"] * slope, tensors["out_bias"] * slope + offset
    return RiskHead(tensors, layers), best[0], best[1]
