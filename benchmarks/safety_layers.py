"""Has the embedded model safety layers once it is aligned, and is freezing them worth more than freezing others?

    python benchmarks/safety_layers.py --seeds 0 1 2 --out benchmarks/results/safety_layers.json

Every seed aligns the embedded model (`ballast align demo` with more refusals), measures it, and looks for its safety layers by
each of the three methods of the stage `localize`. Then the aligned model is fine-tuned with plain SFT on rows a share of which comply with
harmful requests (`degradation.py` says which):

    none     every layer learns
    found    the layers that `gap` found do not; where it found none, the fraction 15/40 to 25/40 of the depth
    random   a band of the same size does not, drawn by the seed from those that share no layer with it

Each stage is a process of its own in `--runs`; a finished one is not done again. `--fast` shows in minutes that
everything runs; its figures say nothing.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from degradation import FIGURES, write_rows
from learn_task import Answer, changes, figures, read_answers
from runs import ALIGN, FAST_SFT, PLAIN_SFT, Runs, arms_parser, write_record

from ballast.pipeline.config_safety_layers import preset_layers

CONFIG = "demo"
FAST = (
    *FAST_SFT,
    "data.max_test=8",
    "localize.prompts=8",
    "localize.pairs=20",
    "localize.replicates=20",
    "localize.max_new_tokens=2",
)
METHODS = ("gap", "ablation", "scaling")
ARMS = ("none", "found", "random")
LAYERS = 30

Band = tuple[int, int]


def main() -> None:
    """Run every arm of every seed, and write the JSON after each of them."""
    parser = arms_parser(__doc__, ARMS)
    parser.add_argument("--poison", type=float, default=0.3, help="share of the rows whose answers comply with harm")
    arguments = parser.parse_args()
    out = arguments.out or (None if arguments.fast else Path("benchmarks/results/safety_layers.json"))
    prefix = "layers-fast" if arguments.fast else "layers"
    sources = write_rows(arguments.runs / f"{prefix}-rows", arguments.poison)
    overrides = (*sources, *ALIGN, *PLAIN_SFT, *(FAST if arguments.fast else ()), *arguments.overrides)
    seeds: dict[str, Any] = {}
    for seed in arguments.seeds:
        runs = Runs(arguments.runs, prefix, overrides, CONFIG, {"none": ()})
        before = read_answers(runs.measure_aligned(seed))
        found = {method: runs.localize(seed, method) for method in METHODS}
        bands = bands_of(found["gap"]["layers"], seed)
        runs.arms = {arm: freezing(bands.get(arm)) for arm in ARMS}
        after = {arm: read_answers(runs.train_and_measure(seed, arm)) for arm in arguments.arms}
        seeds[str(seed)] = {
            "localized": {method: {key: one[key] for key in ("layers", "reason")} for method, one in found.items()},
            "frozen": bands,
            **compared(before, after),
            "stage_seconds": runs.stage_seconds,
        }
        write_record(out, overrides=list(overrides[len(sources) :]), seeds=seeds)
    print(table(seeds))


def bands_of(found: Sequence[int] | None, seed: int) -> dict[str, Band]:
    """What the arms `found` and `random` freeze, first and last layer."""
    first, last = found or preset_layers("SmolLM2-135M-Instruct", LAYERS)[0]
    size = last - first + 1
    others = [start for start in range(LAYERS - size + 1) if start + size <= first or start > last]
    if not others:
        raise SystemExit(
            f"layers {first} to {last} leave no room for another band of that size; there is nothing to compare"
        )
    start = random.Random(seed).choice(others)
    return {"found": (first, last), "random": (start, start + size - 1)}


def freezing(band: Band | None) -> tuple[str, ...]:
    """The settings that freeze a band."""
    return () if band is None else (f"freeze.layers={json.dumps(band)}",)


def compared(before: list[Answer], after: dict[str, list[Answer]]) -> dict[str, Any]:
    """Each arm against the aligned model, and the arms against each other; intervals are over prompts."""
    pairs = [("none", "found"), ("none", "random"), ("random", "found")]
    return {
        "aligned": figures(before, FIGURES),
        "arms": {
            arm: {"after": figures(rows, FIGURES), "change": changes(before, rows, FIGURES)}
            for arm, rows in after.items()
        },
        "against": {
            f"{second} against {first}": changes(after[first], after[second], FIGURES)
            for first, second in pairs
            if {first, second} <= after.keys()
        },
    }


def table(seeds: dict[str, Any]) -> str:
    """Layers found, and the figures of each arm."""
    rows = ["| seed | arm | layers frozen | " + " | ".join(FIGURES) + " |", "|---" * (len(FIGURES) + 3) + "|"]
    for seed, one in seeds.items():
        said = ", ".join(f"{method} {found['layers'] or 'none'}" for method, found in one["localized"].items())
        models = {
            f"aligned (found: {said})": one["aligned"],
            **{arm: part["after"] for arm, part in one["arms"].items()},
        }
        for name, of in models.items():
            band = one["frozen"].get(name)
            cells = [f"{of[figure]['value']:.2f}" for figure in FIGURES]
            rows.append(f"| {seed} | {name} | {'{} to {}'.format(*band) if band else '-'} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
