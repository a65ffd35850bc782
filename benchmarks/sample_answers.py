"""Sample the embedded model's own answers to prompts: the in-domain rows of `train_guards.py`.

    python benchmarks/sample_answers.py --prompts PROMPTS.jsonl --out ANSWERS.jsonl

Reads rows with `prompt` (other columns are carried along), writes one row an answer with `response`. The
temperature alternates over 1.0 and 0.8. No text is printed.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

TEMPERATURES = (1.0, 0.8)


def main() -> None:
    """Parse the command line and sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with `prompt`")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to write, one row an answer")
    parser.add_argument("--samples", type=int, default=4, help="answers a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="longest answer, in tokens")
    parser.add_argument("--batch", type=int, default=128, help="answers sampled at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    sample(rows, args.out, args.samples, args.tokens, args.batch, args.seed)


def sample(rows: list[dict[str, Any]], out: Path, samples: int, tokens: int, batch: int, seed: int) -> None:
    """Write `samples` answers a row to `out`, shortest prompts first (less padding)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ballast.models import embedded_model

    folder = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    torch.manual_seed(seed)
    rows = sorted(rows, key=lambda row: len(row["prompt"]))
    with out.open("w") as handle:
        for number in range(samples):
            for start in range(0, len(rows), batch):
                part, began = rows[start : start + batch], time.perf_counter()
                texts = [
                    tokenizer.apply_chat_template(
                        [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
                    )
                    for row in part
                ]
                inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
                temperature = TEMPERATURES[number % len(TEMPERATURES)]
                with torch.inference_mode():
                    ids = model.generate(
                        **inputs, max_new_tokens=tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0
                    )
                answers = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
                for row, answer in zip(part, answers, strict=True):
                    handle.write(json.dumps({**row, "response": answer, "temperature": temperature}) + "\n")
                handle.flush()
                print(
                    f"sample {number}, rows {start}-{start + len(part)}: {time.perf_counter() - began:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
