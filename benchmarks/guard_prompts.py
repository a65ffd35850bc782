"""Write the prompts whose answers the two shipped guards are trained and measured on.

    python benchmarks/guard_prompts.py --data FOLDER --out FOLDER

Writes `permissive`, `shipped_harmful`, `shipped_harmless`, `composed`, `test_harmful` and `test_harmless.jsonl`
for `sample_answers.py`. The shipped guards were trained with 1, 6, 3, 2, and measured with 4 and 1 answers a prompt.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import guard_data
import guard_requests

# File, kind, how many of its prompts.
PERMISSIVE = (
    ("prompts/advbench.jsonl", "harmful", 190),
    ("prompts/do_not_answer.jsonl", "harmful", 130),
    ("prompts/harmfulqa.jsonl", "harmful", 150),
    ("prompts/jbb_harmful.jsonl", "harmful", 97),
    ("prompts/jbb_benign.jsonl", "ordinary", 97),
    ("task/gpteacher_roleplay.jsonl", "ordinary", 40),
    ("task/gsm8k_train_2k.jsonl", "ordinary", 30),
)
LONGEST = 250  # characters


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with prompts/ and task/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=Path, default=Path(__file__).parents[1] / "src/ballast/data/requests.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shipped = [
        {key: row[key] for key in ("prompt", "kind", "split")} | {"source": "shipped"}
        for row in guard_data.read(args.requests)
    ]
    files = {"permissive": permissive(args.data, args.seed)}
    files["composed"] = [
        {"prompt": prompt, "kind": "harmful" if harmful else "ordinary", "source": "composed"}
        for prompt, harmful in guard_requests.requests(args.seed)
    ]
    for split, name in (("train", "shipped"), ("test", "test")):
        rows = [row for row in shipped if row["split"] == split]
        files[f"{name}_harmful"] = [row for row in rows if row["kind"] == "harmful"]
        files[f"{name}_harmless"] = [row for row in rows if row["kind"] != "harmful"]
    for name, rows in files.items():
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} prompts")


def permissive(data: Path, seed: int) -> list[dict[str, Any]]:
    """Prompts of the sets whose licence allows a shipped model, in the numbers of `PERMISSIVE`."""
    rng, rows = random.Random(seed), []
    for file, kind, count in PERMISSIVE:
        prompts = [
            prompt
            for prompt in dict.fromkeys(row["prompt"] for row in guard_data.read(data / file))
            if len(prompt) <= LONGEST
        ]
        rng.shuffle(prompts)
        rows += [{"prompt": prompt, "kind": kind, "source": file} for prompt in prompts[:count]]
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    main()
