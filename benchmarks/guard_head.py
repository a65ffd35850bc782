"""Fitting of the embedded guard: a head on hidden states of the frozen model.

Shape letters: N rows, K positions of a row (a response at one cut), F features of the frozen model, H hidden units.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from guard_data import Row
from guard_features import LAYERS, States
from guard_metrics import auroc
from guard_rows import calibrate, certainty, label_at, row_weights
from torch.nn import functional

from ballast.guardrails.heads.embedded import RiskHead

POSITIONS = 8
# What is tried; the dev part chooses.
CANDIDATES: list[dict[str, Any]] = [
    {"layers": LAYERS, "hidden": 96, "weight_decay": 1.0},
    {"layers": LAYERS, "hidden": 96, "weight_decay": 10.0},
]
SEEDS = 2  # heads of the chosen kind whose logits are averaged
FALSE_ALARMS = 0.015  # share of ordinary and refusing dev rows that may stand over 0.5
# Total weight of a group: human labels lead, weak labels of sampled answers come last.
GROUP_WEIGHT = {
    "gptfuzz_train": 6.0, "pyrit_objective": 1.5, "gpteacher_roleplay": 2.0, "gsm8k_train_2k": 0.5, "prompt": 1.0,
    "refused_harmful": 1.0, "refused_ordinary": 0.3, "advice": 0.5, "off_topic": 0.5, "affirmed": 0.2, "turned": 0.2,
    "shipped_harmful": 0.4, "shipped_ordinary": 0.4, "shipped_scary": 0.4,
    "sampled_shipped_harmful": 0.4, "sampled_shipped_ordinary": 0.3, "sampled_shipped_scary": 0.3,
    "sampled_permissive_harmful": 0.3, "sampled_permissive_ordinary": 0.3,
    "sampled_composed_harmful": 0.3, "sampled_composed_ordinary": 0.3,
}  # fmt: skip


@dataclass
class Positions:
    """Training positions: `now`, `average` (N, K, F) and `request` (N, 2, F) in float16; the rest (N, K).

    `request` holds the states at the end of the prompt and their mean over the prompt. `mask` is 0 where a row
    has fewer than K positions.
    """

    now: torch.Tensor
    average: torch.Tensor
    request: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    mask: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> "Positions":
        return Positions(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


def positions(rows: list[Row], states: list[States]) -> Positions:
    """K tokens of every row, evenly spread from the end of the prompt to the last token read."""
    n, width = len(rows), states[0].tokens.shape[1]
    out = Positions(
        now=torch.zeros(n, POSITIONS, width, dtype=torch.float16),
        average=torch.zeros(n, POSITIONS, width, dtype=torch.float16),
        request=torch.zeros(n, 2, width, dtype=torch.float16),
        label=torch.zeros(n, POSITIONS),
        weight=torch.zeros(n, POSITIONS),
        mask=torch.zeros(n, POSITIONS),
    )
    for number, (row, state, weight) in enumerate(zip(rows, states, row_weights(rows, GROUP_WEIGHT), strict=True)):
        x, last = state.tokens.float(), len(state.tokens) - 1
        chosen = sorted({round(last * k / (POSITIONS - 1)) for k in range(POSITIONS)})
        k = len(chosen)
        mean = x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]
        out.now[number, :k], out.average[number, :k] = x[chosen].half(), mean[chosen].half()
        out.request[number] = torch.stack([state.tokens[0], state.prompt])
        out.label[number, :k] = torch.tensor([label_at(row, state.ends[i]) for i in chosen])
        certain = torch.tensor([certainty(row, state.ends[i]) for i in chosen])
        out.weight[number, :k] = float(weight) * certain / certain.sum()  # a row counts once, however long
        out.mask[number, :k] = 1.0
    return out


class Net(torch.nn.Module):
    """What `RiskHead` computes, at K positions of N rows at once; see there."""

    def __init__(self, width: int, hidden: int, mean: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.now, self.average = (torch.nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.request = torch.nn.Linear(2 * width, hidden)
        self.out, self.pooled = torch.nn.Linear(hidden, 1), torch.nn.Linear(hidden, 1, bias=False)
        self.mean, self.scale = mean, scale

    def forward(self, batch: Positions, columns: torch.Tensor, drop: float) -> torch.Tensor:
        """Logits (N, K)."""

        def view(x: torch.Tensor) -> torch.Tensor:
            x = (x[..., columns].float() - self.mean) / self.scale
            return functional.dropout(x, drop, self.training)

        request = self.request(view(batch.request).flatten(1))
        units = functional.gelu(self.now(view(batch.now)) + self.average(view(batch.average)) + request[:, None])
        units = functional.dropout(units, drop, self.training)
        pooled = self.pooled(units)[..., 0].cumsum(1) / torch.arange(1, units.shape[1] + 1)
        return self.out(units)[..., 0] + pooled


def fit_head(rows: list[Row], states: list[States], seed: int) -> tuple[RiskHead, dict[str, Any]]:
    """The best of `CANDIDATES` by weighted cross-entropy on the dev part, `SEEDS` times, averaged and calibrated there."""
    data, dev = positions(rows, states), torch.tensor([row.part == "dev" for row in rows])
    fit_rows, dev_rows = (~dev).nonzero()[:, 0], dev.nonzero()[:, 0]
    tried, best = [], None
    for options in CANDIDATES:
        net, loss, epoch = train(data, fit_rows, dev_rows, **options, seed=seed)
        tried.append(options | {"epochs": epoch, "dev_loss": round(loss, 4)})
        print(tried[-1], flush=True)
        if best is None or loss < best[0]:
            best = (loss, options, net)
    assert best is not None
    nets = [best[2]]
    nets += [train(data, fit_rows, dev_rows, **best[1], seed=seed + n)[0] for n in range(1, SEEDS)]
    head = to_head(nets, best[1]["layers"])
    shift = set_threshold(head, [rows[i] for i in dev_rows], [states[i] for i in dev_rows])
    return head, best[1] | {"seeds": SEEDS, "threshold": shift, "tried": tried}


def columns_of(layers: tuple[int, ...], width: int) -> torch.Tensor:
    """Columns of F that belong to `layers`; `width` is F."""
    each = width // len(LAYERS)
    return torch.cat([torch.arange(each) + LAYERS.index(layer) * each for layer in layers])


def train(
    data: Positions,
    fit: torch.Tensor,
    dev: torch.Tensor,
    layers: tuple[int, ...],
    hidden: int,
    weight_decay: float,
    seed: int,
    epochs: int = 6,
    drop: float = 0.2,
) -> tuple[Net, float, int]:
    """A net at its best epoch by dev loss, that loss, and the epoch."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    columns = columns_of(layers, data.now.shape[2])
    known = data.now[fit][data.mask[fit] > 0][:, columns][::3].float()
    net = Net(len(columns), hidden, known.mean(0), known.std(0) + 1e-3)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=weight_decay)
    steps = epochs * math.ceil(len(fit) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    best = (math.inf, 0, net)
    for epoch in range(1, epochs + 1):
        net.train()
        for part in fit[torch.randperm(len(fit), generator=generator)].split(64):
            optimiser.zero_grad()
            batch = data[part]
            each = functional.binary_cross_entropy_with_logits(
                net(batch, columns, drop), batch.label, batch.weight, reduction="sum"
            )
            (each / batch.weight.sum()).backward()
            optimiser.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            total = torch.zeros(2)
            for part in dev.split(256):
                batch = data[part]
                each = functional.binary_cross_entropy_with_logits(
                    net(batch, columns, 0.0), batch.label, batch.weight, reduction="sum"
                )
                total += torch.stack([each, batch.weight.sum()])
        loss = float(total[0] / total[1])
        print(f"epoch {epoch}: dev loss {loss:.4f}", flush=True)
        if loss < best[0]:
            best = (loss, epoch, copy.deepcopy(net))
    return best[2], best[0], best[1]


def to_head(nets: list[Net], layers: tuple[int, ...]) -> RiskHead:
    """Nets side by side as one head whose logit is the mean of theirs."""
    n = len(nets)
    with torch.no_grad():
        requests = [net.request.weight.chunk(2, dim=1) for net in nets]
        return RiskHead(
            {
                "mean": nets[0].mean,
                "scale": nets[0].scale,
                "now": torch.cat([net.now.weight for net in nets]),
                "average": torch.cat([net.average.weight for net in nets]),
                "prompt": torch.cat([end for end, _ in requests]),
                "request": torch.cat([mean for _, mean in requests]),
                "bias": torch.cat([net.request.bias for net in nets]),
                "out": torch.cat([net.out.weight[0] for net in nets]) / n,
                "pooled": torch.cat([net.pooled.weight[0] for net in nets]) / n,
                "out_bias": torch.stack([net.out.bias for net in nets]).mean(0),
            },
            layers,
        )


def head_risks(head: RiskHead, states: list[States], share: float = 1.0) -> np.ndarray:
    """Risk of each row at `share` of its tokens."""
    columns = columns_of(tuple(head.layers), states[0].tokens.shape[1])
    out = []
    for state in states:
        x = state.tokens[: 1 + math.ceil((len(state.tokens) - 1) * share), columns].float()
        # The mean over the prompt is all that the head reads of it before its end: one stand-in token gives it.
        stand_in = 2 * state.prompt[columns].float() - x[0]
        out.append(head.risk(torch.cat([stand_in[None], x]), 2)[-1])
    return np.array(out)


def set_threshold(head: RiskHead, rows: list[Row], states: list[States]) -> dict[str, float]:
    """Calibrate the head (Platt), then lower its logit until few safe dev rows stand over 0.5."""
    risk = np.clip(head_risks(head, states), 1e-6, 1 - 1e-6)
    logit, label = np.log(risk / (1 - risk)), np.array([row.label for row in rows])
    slope, offset = calibrate(logit, label, row_weights(rows, GROUP_WEIGHT))
    calm = np.array([row.label <= 0.5 and row.group not in ("gptfuzz_train", "pyrit_objective") for row in rows])
    limit = float(np.quantile(slope * logit[calm] + offset, 1 - FALSE_ALARMS))
    lowered = max(0.0, limit)
    head.tensors["out"] *= slope
    head.tensors["pooled"] *= slope
    head.tensors["out_bias"] = head.tensors["out_bias"] * slope + offset - lowered
    return {"slope": round(slope, 3), "offset": round(offset, 3), "lowered_by": round(lowered, 3)}


def row_auroc(head: RiskHead, rows: list[Row], states: list[States], share: float = 1.0) -> float:
    """AUROC of the risk at `share` of each row's tokens."""
    return auroc(head_risks(head, states, share), np.array([row.label for row in rows]))
