"""Fitting of the embedded guard: a low-rank adapter in the upper blocks and a head that reads their states.

Shape letters: B rows of a batch, T tokens, K positions of a row (the end of the prompt, then each response token),
D width of the model, H hidden units of the head.
"""

import copy
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from guard_data import Row
from guard_features import LOWER, States
from guard_rows import certainty, label_at, row_weights
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ballast.guardrails.heads.risk_head import RiskHead
from ballast.models import embedded_model

UPPER = 22  # the block that the head reads
RANK = 16
MODULES = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
HIDDEN = 96
EPOCHS = 2
BATCH_TOKENS = 2400
ADAPTER_RATE, HEAD_RATE = 4e-4, 1e-3
# Total weight of a group: human labels lead, weak labels of sampled answers come last.
GROUP_WEIGHT = {
    "gptfuzz_train": 6.0, "pyrit_objective": 1.5, "gpteacher_roleplay": 2.0, "gsm8k_train_2k": 0.4, "prompt": 0.8,
    "refused_harmful": 0.8, "refused_ordinary": 0.3, "advice": 0.5, "off_topic": 0.5, "affirmed": 0.2, "turned": 0.2,
    "shipped_harmful": 0.4, "shipped_ordinary": 0.4, "shipped_scary": 0.4,
    "sampled_shipped_harmful": 0.5, "sampled_shipped_ordinary": 0.4, "sampled_shipped_scary": 0.4,
    "sampled_permissive_harmful": 0.5, "sampled_permissive_ordinary": 0.4,
    "sampled_composed_harmful": 0.4, "sampled_composed_ordinary": 0.4,
}  # fmt: skip


@dataclass
class Batch:
    """Rows padded on the right: `states` (B, T, D), `prompt` (B,) lengths; `label` and `weight` (B, K)."""

    states: torch.Tensor
    prompt: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor


class Guard(torch.nn.Module):
    """The blocks above `LOWER` with an adapter, and the head of `RiskHead` over whole batches; see there."""

    def __init__(self) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModel

        model = AutoModel.from_pretrained(embedded_model(), dtype=torch.bfloat16)
        model.layers = model.layers[LOWER:UPPER]
        model.norm = torch.nn.Identity()  # the guard reads a block's output as it is
        model.config.num_hidden_layers = UPPER - LOWER
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(MODULES))
        self.blocks = get_peft_model(model, config)
        width = model.config.hidden_size
        self.now, self.average = (torch.nn.Linear(width, HIDDEN, bias=False) for _ in range(2))
        self.request = torch.nn.Linear(2 * width, HIDDEN)
        self.out, self.pooled = torch.nn.Linear(HIDDEN, 1), torch.nn.Linear(HIDDEN, 1, bias=False)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """States (B, T, D) of block `UPPER` from those of block `LOWER`; padding on the right is never looked at."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.blocks(inputs_embeds=states, use_cache=False).last_hidden_state.float()

    def standardise(self, batches: list[Batch]) -> None:
        """Take mean and scale of the states from some batches."""
        with torch.no_grad():
            known = torch.cat([self.read(batch.states).flatten(0, 1) for batch in batches])
        self.mean.copy_(known.mean(0))
        self.scale.copy_(known.std(0) + 1e-3)

    def forward(self, batch: Batch, drop: float = 0.0) -> torch.Tensor:
        """Logits (B, K); what lies beyond a row's end is meaningless and has weight 0."""
        x = (self.read(batch.states) - self.mean) / self.scale
        places = torch.arange(x.shape[1])
        asked = (places < batch.prompt[:, None]).float()[..., None]
        mean_prompt = (x * asked).sum(1) / asked.sum(1)
        at = (batch.prompt[:, None] - 1 + torch.arange(batch.label.shape[1])).clamp(max=x.shape[1] - 1)
        x = x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))  # (B, K, D)
        x, request = functional.dropout(x, drop, self.training), torch.cat([x[:, 0], mean_prompt], 1)
        request = self.request(functional.dropout(request, drop, self.training))
        count = torch.arange(1, x.shape[1] + 1)[:, None]
        units = functional.gelu(self.now(x) + self.average(x).cumsum(1) / count + request[:, None])
        pooled = self.pooled(units)[..., 0].cumsum(1) / count[:, 0]
        return self.out(units)[..., 0] + pooled

    def head(self) -> RiskHead:
        """What the guard ships: the head's tensors and the adapter's, by block and module."""
        adapter = {}
        for name, module in self.blocks.named_modules():
            if hasattr(module, "lora_A"):
                number, rest = name.split("layers.")[1].split(".", 1)
                key = f"{LOWER + int(number) + 1}.{rest}"
                adapter[f"{key}.down"] = module.lora_A["default"].weight.detach()
                adapter[f"{key}.up"] = module.lora_B["default"].weight.detach() * module.scaling["default"]
        end, mean = self.request.weight.detach().chunk(2, dim=1)
        tensors = {
            "mean": self.mean, "scale": self.scale, "now": self.now.weight, "average": self.average.weight, "prompt": end,
            "request": mean, "bias": self.request.bias, "out": self.out.weight[0], "pooled": self.pooled.weight[0],
            "out_bias": self.out.bias,
        }  # fmt: skip
        return RiskHead({name: tensor.detach().clone() for name, tensor in tensors.items()}, (UPPER,), adapter=adapter)


def batches(
    rows: list[Row], states: list[States], weights: npt.NDArray[np.float64], rng: random.Random
) -> Iterator[Batch]:
    """All rows once, in batches of like length, in random order."""
    order = list(range(len(rows)))
    rng.shuffle(order)
    groups = []
    for start in range(0, len(order), 400):
        part: list[int] = []
        for number in sorted(order[start : start + 400], key=lambda n: len(states[n].tokens)):
            if part and len(states[number].tokens) * (len(part) + 1) > BATCH_TOKENS:
                groups.append(part)
                part = []
            part.append(number)
        groups.append(part)
    rng.shuffle(groups)
    for group in groups:
        labels, each = [], []
        for number in group:
            row, ends = rows[number], states[number].ends
            certain = torch.tensor([certainty(row, end) for end in ends])
            labels.append(torch.tensor([label_at(row, end) for end in ends]))
            each.append(float(weights[number]) * certain / certain.sum())  # a row counts once, however long
        yield Batch(
            pad_sequence([states[number].tokens for number in group], batch_first=True),
            torch.tensor([states[number].prompt_length for number in group]),
            pad_sequence(labels, batch_first=True),
            pad_sequence(each, batch_first=True),
        )


def fit(rows: list[Row], states: list[States], seed: int) -> tuple[RiskHead, dict[str, Any]]:
    """Train on the fit part, keep the epoch with the lowest loss on the dev part."""
    torch.manual_seed(seed)
    rng, guard = random.Random(seed), Guard()
    weights = row_weights(rows, GROUP_WEIGHT)
    parts = {name: [n for n, row in enumerate(rows) if row.part == name] for name in ("fit", "dev")}

    def draw(part: str) -> Iterator[Batch]:
        chosen = parts[part]
        return batches([rows[n] for n in chosen], [states[n] for n in chosen], weights[chosen], rng)

    first = list(draw("fit"))
    guard.standardise(first[:12])
    total = EPOCHS * math.ceil(len(first) * 1.02)
    adapter = [p for p in guard.blocks.parameters() if p.requires_grad]
    head = [p for name, p in guard.named_parameters() if not name.startswith("blocks.")]
    optimiser = torch.optim.AdamW(
        [
            {"params": adapter, "lr": ADAPTER_RATE, "weight_decay": 0.0},
            {"params": head, "lr": HEAD_RATE, "weight_decay": 0.1},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 40, 0.02 + 0.98 * max(0.0, 1 - step / total))
    )
    tried, best = list[dict[str, float]](), (math.inf, copy.deepcopy(guard.state_dict()))
    began, step = time.perf_counter(), 0
    for epoch in range(1, EPOCHS + 1):
        guard.train()
        running = 0.0
        for batch in draw("fit"):
            loss = losses(guard, batch, drop=0.1).sum() / len(batch.prompt)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*adapter, *head], 1.0)
            optimiser.step()
            schedule.step()
            running, step = 0.97 * running + 0.03 * float(loss.detach()), step + 1
            if step % 20 == 0:
                print(f"step {step}/{total}: loss {running:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
        guard.eval()
        with torch.no_grad():
            dev = [(losses(guard, batch, 0.0).sum(), batch.weight.sum()) for batch in draw("dev")]
        loss_dev = float(sum(loss for loss, _ in dev) / sum(weight for _, weight in dev))
        tried.append({"epoch": epoch, "dev_loss": round(loss_dev, 4)})
        print(tried[-1], flush=True)
        if loss_dev < best[0]:
            best = (
                loss_dev,
                {k: v.clone() for k, v in guard.state_dict().items() if "lora" in k or "blocks." not in k},
            )
    guard.load_state_dict(best[1], strict=False)
    return guard.head(), {
        "lower": LOWER, "upper": UPPER, "rank": RANK, "modules": MODULES, "hidden": HIDDEN, "batch_tokens": BATCH_TOKENS,
        "rates": [ADAPTER_RATE, HEAD_RATE], "epochs": tried,
    }  # fmt: skip


def losses(guard: Guard, batch: Batch, drop: float) -> torch.Tensor:
    """Weighted cross-entropy (B, K)."""
    return functional.binary_cross_entropy_with_logits(guard(batch, drop), batch.label, batch.weight, reduction="none")
