"""What safety-aware probing costs: a probed LoRA SFT step against the plain one, paired in one run.

    python benchmarks/overhead_probing.py --out benchmarks/results/probing_overhead.json
    python benchmarks/overhead_probing.py --tiny --rounds 2 --out /dev/stdout

A task batch of 16 rows of 256 random tokens, 24 of them the prompt, and 4 safety pairs of 24 + 40 tokens a step. Rounds,
ratios and clocks are those of `step_overhead.py`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import step_overhead
import torch
from datasets import Dataset
from demo_seeds import hardware
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PrinterCallback
from trl import SFTConfig, SFTTrainer

from ballast import SafetyProbing
from ballast.models import EMBEDDED_MODEL, resolve_model
from ballast.pipeline.config_probing import ProbingConfig
from ballast.pipeline.training.safety_pairs import SafetyPair

VARIANTS = ("plain", "fresh", "stale")
ALLOWED = {"fresh": 4.5, "stale": 3.2}
PAIR_TOKENS = (24, 40)  # of the prompt, of each answer


class ProbedSFT(SafetyProbing, SFTTrainer):
    """SFT with the probe."""


def main() -> None:
    """Measure, print the ratios, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all variants")
    parser.add_argument("--steps", type=int, default=3, help="steps of a variant in a round; the first is not counted")
    parser.add_argument("--rows", type=int, default=16, help="rows of the task a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a random model of 4 layers, to try the script")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/probing_overhead.json"))
    arguments = parser.parse_args()
    step_overhead.ALLOWED["probing"] = ALLOWED
    variants = {name: variant(name, arguments) for name in VARIANTS}
    record = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": {**hardware(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "probing": step_overhead.paired(variants, arguments, "probing"),
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def variant(name: str, arguments: argparse.Namespace) -> Any:
    """A trainer of SFT on random tokens, plain or probed."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, 49_000, (count,), generator=generator).tolist()

    prompt = step_overhead.PROMPT_TOKENS
    mask = [0] * prompt + [1] * (arguments.length - prompt)
    rows = [
        {"input_ids": tokens(arguments.length), "completion_mask": mask}
        for _ in range(arguments.rows * arguments.steps)
    ]
    args = SFTConfig(
        **step_overhead.common(arguments),
        per_device_train_batch_size=arguments.rows,
        max_length=arguments.length,
        completion_only_loss=True,
    )
    asked, answer = PAIR_TOKENS
    pairs = [SafetyPair(tuple(tokens(asked)), tuple(tokens(answer)), tuple(tokens(answer))) for _ in range(8)]
    given = {} if name == "plain" else {"probing": ProbingConfig(probe=name), "safety_pairs": pairs}
    trainer = (ProbedSFT if given else SFTTrainer)(
        tiny(arguments) if arguments.tiny else step_overhead.policy(arguments),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(resolve_model(EMBEDDED_MODEL)),
        peft_config=step_overhead.lora(),
        **given,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def tiny(arguments: argparse.Namespace) -> Any:
    """A random model that takes a second a step."""
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
