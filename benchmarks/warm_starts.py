"""What a warm start teaches: the demo's model aligned under several settings, each measured on the test prompts before any GRPO.

    python benchmarks/warm_starts.py --out benchmarks/results/warm_starts.json

A good one declines harmful prompts and little else. The distance between the two is written down as the difference of
the log odds of refusing, which does not depend on how readily the model declines at all.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from demo_seeds import hardware

from ballast.pipeline.config_loading import load_config
from ballast.pipeline.context import RunContext
from ballast.pipeline.evaluation.measure import measure_model
from ballast.pipeline.evaluation.statistics import Estimate
from ballast.pipeline.run import run

WHOLE = ["align.opening_tokens=null", "align.harmful_share=null", "align.sampling.max_new_tokens=24"]
VARIANTS = {
    "as in the demo": [],
    "whole answers, all harmful rows, 1.5 epochs": [*WHOLE, "align.epochs=1.5"],
    "openings of 8 tokens, a quarter harmful, 3 epochs": [
        "align.opening_tokens=8",
        "align.sampling.max_new_tokens=8",
        "align.harmful_share=0.25",
        "align.epochs=3",
    ],
}


def main() -> None:
    """Align and measure one variant after the other; the JSON is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/warm_starts.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/warm-starts"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware(),
        "seed": arguments.seed,
    }
    record["variants"] = {}
    for number, (name, overrides) in enumerate(VARIANTS.items()):
        given = [f"name=variant-{number}", f"out={arguments.runs}", f"seed={arguments.seed}", *overrides]
        record["variants"][name] = {"overrides": overrides, **measured(given)}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def measured(overrides: list[str]) -> dict[str, Any]:
    """One variant: what it was measured at, the distance, and the seconds of its training."""
    config = load_config("demo", overrides)
    context = RunContext(config)
    started = time.perf_counter()
    run(config, stages=["align"], context=context)
    seconds = time.perf_counter() - started
    context.forget_weights()
    model = context.folder.stage("align") / "model"
    summary = measure_model(context, str(model), context.folder.path, "aligned")
    distance = log_odds(summary.refusal_harmful) - log_odds(summary.refusal_ordinary)
    return {"align_seconds": round(seconds, 1), "log_odds_apart": distance, "row": json.loads(summary.to_json())}


def log_odds(share: Estimate) -> float:
    """Log odds of a share, with half an answer added to each side so that 0 and 1 are finite."""
    yes = round((share.value or 0.0) * share.n)
    return math.log((yes + 0.5) / (share.n - yes + 0.5))


if __name__ == "__main__":
    main()
