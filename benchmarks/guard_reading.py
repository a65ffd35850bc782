"""How the embedded guard reads its trace, its calibration and its threshold: all from the dev part.

Shape letters: N rows, T positions of a row (the end of the prompt, then each response token).
"""

import random
from collections import defaultdict
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from guard_adapter import GROUP_WEIGHT
from guard_data import Row
from guard_metrics import auroc
from guard_rows import calibrate, row_weights

from ballast.guardrails.heads.backbone import Backbone
from ballast.guardrails.heads.risk_head import Reading, RiskHead
from ballast.models import embedded_model

HUMAN = ("gptfuzz_train", "pyrit_objective")  # groups with human labels
FALSE_ALARMS = (
    0.01  # share of ordinary and refusing dev rows that may stand over 0.5; other text gives two to three times it
)
MOST = {"gptfuzz_train": 500}  # dev rows of a group; 100 of the others
CONTEXT = 900  # tokens


def settle(head: RiskHead, rows: list[Row], seed: int) -> tuple[RiskHead, dict[str, Any]]:
    """Choose the reading by AUROC (mean over the two human sets and the rest), calibrate (Platt), then lower the
    logit until few safe rows stand over 0.5.

    Args:
        head: as trained.
        rows: the dev part with whole responses.
        seed: draws the rows that are used.
    """
    rows = _some(rows, random.Random(seed))
    traces = _logits(head, rows)
    label, group = np.array([row.label for row in rows]), np.array([row.group for row in rows])
    sets = [group == HUMAN[0], group == HUMAN[1], ~np.isin(group, HUMAN)]
    tried = []
    for memory, settled, discount in product((0.0, 0.5, 1.0), (0, 8, 16, 24), (0.0, 0.25, 0.5)):
        reading = Reading(memory, settled, discount)
        if memory == 0.0 and settled > 0:
            continue  # the same as settled = 0
        logit = _read(reading, traces)
        scores = [auroc(logit[part], label[part]) for part in sets]
        tried.append((float(np.mean(scores)), reading, [round(score, 3) for score in scores]))
    _, reading, scores = max(tried, key=lambda entry: entry[0])
    logit = _read(reading, traces)
    slope, offset = calibrate(logit, label, row_weights(rows, GROUP_WEIGHT))
    calm = (label <= 0.5) & ~np.isin(group, HUMAN)
    lowered = max(0.0, float(np.quantile(slope * logit[calm] + offset, 1 - FALSE_ALARMS)))
    tensors = dict(head.tensors)
    # The prompt's share is taken off after scaling: adding a constant to every logit adds (1 - discount) of it.
    tensors |= {"out": tensors["out"] * slope, "pooled": tensors["pooled"] * slope}
    tensors["out_bias"] = tensors["out_bias"] * slope + (offset - lowered) / (1 - reading.discount)
    before = max((entry for entry in tried if entry[1] == Reading()), key=lambda entry: entry[0])
    numbers = {"slope": round(slope, 3), "offset": round(offset, 3), "lowered_by": round(lowered, 3)}
    return RiskHead(tensors, head.layers, head.default_system, head.adapter, reading), {
        "reading": asdict(reading),
        "rows": len(rows),
        "false_alarms": FALSE_ALARMS,
        "dev_auroc": dict(zip((*HUMAN, "others"), scores, strict=True)),
        "dev_auroc_each_position_by_itself": dict(zip((*HUMAN, "others"), before[2], strict=True)),
        **numbers,
    }


def _some(rows: list[Row], rng: random.Random) -> list[Row]:
    groups = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    return [row for name, part in groups.items() for row in rng.sample(part, min(len(part), MOST.get(name, 100)))]


def _logits(head: RiskHead, rows: list[Row]) -> list[torch.Tensor]:
    backbone = Backbone(embedded_model(), head.layers, default_system=head.default_system, adapter=head.adapter)
    encoded = [backbone.encode([{"role": "user", "content": row.prompt}], row.response) for row in rows]
    order, found = sorted(range(len(rows)), key=lambda n: len(encoded[n].ids)), dict[int, torch.Tensor]()
    for start in range(0, len(order), 16):
        part = order[start : start + 16]
        for number, states in zip(part, backbone.hidden([encoded[n].ids[:CONTEXT] for n in part]), strict=True):
            found[number] = head.logits(states, encoded[number].prompt_length)
    return [found[number] for number in range(len(rows))]


def _read(reading: Reading, traces: list[torch.Tensor]) -> npt.NDArray[np.float64]:
    return np.array([float(reading.of(trace)[-1]) for trace in traces])
