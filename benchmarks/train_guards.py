"""Train the two small guards that Ballast ships, and write down what they were trained on and how they measure.

    python benchmarks/guard_prompts.py --data FOLDER --out FOLDER
    python benchmarks/sample_answers.py --prompts PROMPTS.jsonl --out ANSWERS.jsonl
    python benchmarks/train_guards.py --data FOLDER --answers ANSWERS.jsonl ... --test-answers ... --cache FOLDER --out FOLDER

`--data` holds `responses/`, `task/` and `prompts/` as JSON lines. Written to `--out`: `embedded.safetensors`
and `ngram.safetensors`, and beside them `embedded.json` and `ngram.json`. The states of the lower blocks
take five minutes on two cores and are kept in `--cache`; training above them takes some 36 minutes. No text is printed.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import guard_adapter
import guard_data
import guard_features
import guard_metrics
import guard_ngram
import guard_reading

from ballast.guardrails.heads import embedded
from ballast.guardrails.heads.embedded import EmbeddedGuard
from ballast.guardrails.heads.risk_head import RiskHead
from ballast.guardrails.ngram import NgramGuard

REQUESTS = Path(__file__).parents[1] / "src/ballast/data/requests.jsonl"


def main() -> None:
    """Parse the command line, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--answers", type=Path, nargs="+", required=True, help="sampled answers to training prompts")
    parser.add_argument("--more-answers", type=Path, nargs="*", default=[], help="further answers, none left out")
    parser.add_argument(
        "--test-answers", type=Path, nargs="+", required=True, help="sampled answers to the shipped test prompts"
    )
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=embedded.WEIGHTS.parent)
    parser.add_argument("--requests", type=Path, default=REQUESTS)
    parser.add_argument(
        "--eval-rows", type=int, default=200, help="rows a held-out set that the embedded guard is measured on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        choices=("ngram", "embedded", "settle", "measure", "agreement"),
        help="one step: train and measure the n-gram guard, train the embedded guard, settle its threshold, measure it, compare the two",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    steps = {
        "ngram": train_ngram,
        "embedded": train_embedded,
        "settle": settle_embedded,
        "measure": measure_embedded,
        "agreement": write_agreement,
    }
    for name, step in steps.items():
        if args.only in (None, name):
            step(args)


def train_ngram(args: argparse.Namespace) -> None:
    """The judge: half "judge" of every source."""
    rows = guard_data.training_rows(
        args.data, args.requests, args.answers, args.more_answers, 1300, dict.fromkeys(guard_data.CHAT, 650), args.seed
    )
    rows = [row for row in rows if row.half == "judge"]
    model, choice = guard_ngram.fit_ngram(rows, guard_data.prompt_rows(args.data, "judge"), args.seed)
    model.save(args.out / "ngram.safetensors")
    guard = NgramGuard(weights=args.out / "ngram.safetensors")
    write_card(args, "ngram", rows, choice, guard_metrics.measure(guard, args, None))


def train_embedded(args: argparse.Namespace) -> None:
    """The reward: half "guard", most of the human labels, and prompts without a response."""
    rows = embedded_rows(args)
    head, choice = guard_adapter.fit(rows, guard_features.states_of(rows, args.cache), args.seed)
    head.save(args.out / "embedded.safetensors")
    write_card(args, "embedded", rows, choice, {})


def settle_embedded(args: argparse.Namespace) -> None:
    """How the trained guard reads its trace, its calibration and threshold: by the dev part with whole responses."""
    head, path = RiskHead.load(args.out / "embedded.safetensors"), args.out / "embedded.json"
    rows = [row for row in embedded_rows(args, longest=3000) if row.part == "dev" and row.response]
    head, choice = guard_reading.settle(head, rows, args.seed)
    head.save(args.out / "embedded.safetensors")
    card = json.loads(path.read_text())
    card["chosen"] |= {"settled": choice}
    path.write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(choice))


def measure_embedded(args: argparse.Namespace) -> None:
    """Measure the embedded guard's weights in `--out`, into its card."""
    guard, path = EmbeddedGuard(weights=args.out / "embedded.safetensors"), args.out / "embedded.json"
    card = json.loads(path.read_text())
    card["numbers"] = guard_metrics.measure(
        guard, args, args.eval_rows, NgramGuard(weights=args.out / "ngram.safetensors")
    )
    path.write_text(json.dumps(card, indent=2) + "\n")


def embedded_rows(args: argparse.Namespace, longest: int = guard_data.MAX_RESPONSE) -> list[guard_data.Row]:
    """Rows of the guard's half, capped by group and label, and prompts without a response."""
    caps = {"gptfuzz_train": 1800} | {"gpteacher_roleplay": 900, "gsm8k_train_2k": 150}
    answers = [*args.answers, *args.more_answers]
    rows = guard_data.training_rows(args.data, args.requests, answers, [], 400, caps, args.seed, longest)
    rows = [row for row in rows if row.half == "guard"]
    return rows + guard_data.request_rows(args.data, "guard", 700, args.seed)


def write_agreement(args: argparse.Namespace) -> None:
    """How the two agree, into both cards."""
    guards = (
        EmbeddedGuard(weights=args.out / "embedded.safetensors"),
        NgramGuard(weights=args.out / "ngram.safetensors"),
    )
    numbers = guard_metrics.agreement(*guards, args)
    for guard in guards:
        path = args.out / f"{guard.name}.json"
        card = json.loads(path.read_text())
        card["numbers"]["agreement_on_shipped_test"] = numbers
        path.write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(numbers))


def write_card(
    args: argparse.Namespace, name: str, rows: list[guard_data.Row], choice: dict[str, Any], numbers: dict[str, Any]
) -> None:
    """Write what a guard was trained on and how it measures, and print the numbers."""
    card = {
        "guard": name,
        "script": "benchmarks/train_guards.py",
        "seed": args.seed,
        "split": "by CRC-32 of the normalised prompt: half 'guard' trains embedded, half 'judge' trains ngram; "
        "a sixth of each half ('dev') chooses and calibrates; of the GPTFuzz questions three in four are the guard's; prompts of "
        "held-out sets and shipped test prompts are dropped",
        "licences": guard_data.LICENCES,
        "rows": {
            part: dict(sorted(Counter(row.group for row in rows if row.part == part).items()))
            for part in ("fit", "dev")
        },
        "held_out": guard_data.HELD_OUT,
        "chosen": choice,
        "numbers": numbers,
    }
    (args.out / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps({"guard": name, "chosen": choice, "numbers": numbers}, indent=1))


if __name__ == "__main__":
    main()
