"""What shaping costs: a step of shaped training against the same step of plain TRL, paired in one run.

    python benchmarks/step_overhead.py --out benchmarks/results/step_overhead.json
    python benchmarks/step_overhead.py --parts sft --length 256 --rounds 2 --out /dev/stdout
    python benchmarks/step_overhead.py --parts safegrad --out benchmarks/results/safegrad_overhead.json

SFT: LoRA on the embedded model (vocabulary 49,152), rows of `--length` random tokens of which 24 are the prompt. Every
token of `k2` and `exact` has STAR 0.5, so all of them are held near the reference; `... safe` are wholly safe rows.
`k2` reads cached log-probs, `exact` runs the reference at every step. GRPO: the same completions budget and the embedded
guard, once as TRL's sequence-level reward (one cut a response) and once shaped at every 5 words. SafeGrad:
`overhead_safegrad.py`.

A round trains every variant for a few steps, in another order each round; a ratio is the median over rounds of this
variant's median step against plain TRL's of the same round. Wall seconds suffer on a busy machine; CPU seconds are this
process's, all threads together. Peak memory is the resident set of a process of its own for each variant (on a GPU:
allocated device memory), so it holds weights and libraries too; `above_start` is what training adds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import overhead_safegrad
import torch
from datasets import Dataset
from demo_seeds import hardware
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from ballast import GuardReward, ShapedGRPOTrainer, ShapedSFTTrainer, load_guardrail
from ballast.guardrails.heads.embedded import EmbeddedOptions
from ballast.guardrails.segments import SegmentOptions
from ballast.models import EMBEDDED_MODEL, resolve_model
from ballast.pipeline.config_sft import CorrectedLoss, FaithfulLoss

PROMPT_TOKENS = 24
PROMPTS = ("How do I bake bread?", "What is a good way to learn to swim?")
SFT_VARIANTS = {
    "plain": (None, 1.0),
    "k2": (FaithfulLoss(), 0.5),
    "exact": (CorrectedLoss(), 0.5),
    "k2 safe": (FaithfulLoss(), 1.0),
    "exact safe": (CorrectedLoss(), 1.0),
}
GRPO_VARIANTS = ("plain", "shaped")
ALLOWED = {
    "sft": {"k2": 1.1, "exact": 1.7},
    "grpo": {"shaped": 1.15},
    "memory": {"k2": 1.3, "exact": 1.3},
    "safegrad": {"every step": 1.6, "every 4": 1.2},
}


class StepClock(TrainerCallback):
    """Wall and CPU seconds of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self._begun = (0.0, 0.0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clocks."""
        self._begun = _now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clocks."""
        wall, cpu = _now()
        self.steps.append((wall - self._begun[0], cpu - self._begun[1]))


def _now() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def main() -> None:
    """Measure, print the ratios, write the JSON."""
    arguments = parse()
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments)))
        return
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": {**hardware(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "settings": {key: str(value) for key, value in vars(arguments).items()},
    }
    if "sft" in arguments.parts:
        record["sft"] = paired({name: sft_variant(name, arguments) for name in SFT_VARIANTS}, arguments, "sft")
    if "grpo" in arguments.parts:
        record["grpo"] = paired({name: grpo_variant(name, arguments) for name in GRPO_VARIANTS}, arguments, "grpo")
    if "safegrad" in arguments.parts:
        variants = {name: overhead_safegrad.safegrad_variant(name, arguments) for name in overhead_safegrad.VARIANTS}
        record["safegrad"] = paired(variants, arguments, "safegrad", statistics.mean)
        del variants
        record["safegrad_memory"] = memory(arguments, [f"safegrad:{name}" for name in overhead_safegrad.VARIANTS])
    if "memory" in arguments.parts:
        record["memory"] = memory(arguments, list(SFT_VARIANTS))
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("sft", "grpo", "memory", "safegrad"), default=["sft", "grpo", "memory"]
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all variants")
    parser.add_argument("--steps", type=int, default=3, help="steps of a variant in a round; the first is not counted")
    parser.add_argument("--length", type=int, default=1024, help="tokens of an SFT row")
    parser.add_argument("--rows", type=int, default=1, help="SFT rows a step")
    parser.add_argument("--completions", type=int, default=8, help="GRPO completions a step, in groups of 4")
    parser.add_argument("--tokens", type=int, default=40, help="tokens of a GRPO completion")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_overhead.json"))
    parser.add_argument("--task-rows", type=int, default=16, help="rows a step of the part safegrad")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def paired(
    variants: dict[str, Any],
    arguments: argparse.Namespace,
    part: str,
    centre: Callable[[Any], float] = statistics.median,
) -> dict[str, Any]:
    """Round after round, the centre of each variant's steps, and the ratios to `plain` within a round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    order = list(variants)
    for number in range(arguments.rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            steps = train(variants[name])[1:]
            seconds[name].append(tuple(centre(column) for column in zip(*steps, strict=True)))  # type: ignore[arg-type]
    result: dict[str, Any] = {}
    for name, rounds in seconds.items():
        walls, cpus = zip(*rounds, strict=True)
        ratios = [
            [mine[clock] / plain[clock] for mine, plain in zip(rounds, seconds["plain"], strict=True)]
            for clock in (0, 1)
        ]
        result[name] = {
            "wall_s": round(statistics.median(walls), 3),
            "cpu_s": round(statistics.median(cpus), 3),
            "wall_ratio": round(statistics.median(ratios[0]), 3),
            "cpu_ratio": round(statistics.median(ratios[1]), 3),
            "wall_ratios": [round(ratio, 3) for ratio in ratios[0]],
            "cpu_ratios": [round(ratio, 3) for ratio in ratios[1]],
            "allowed": ALLOWED[part].get(name),
        }
        print(f"{part} {name}: {result[name]}", flush=True)
    return result


def train(trainer: Any) -> list[tuple[float, float]]:
    """Seconds of each step of one more training of this trainer."""
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return clock.steps


def policy(arguments: argparse.Namespace) -> Any:
    """The embedded model in the precision asked for."""
    folder = resolve_model(EMBEDDED_MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
    return model.to("cuda") if torch.cuda.is_available() else model


def lora() -> LoraConfig:
    """The adapter of the shipped configurations."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def common(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments that SFT and GRPO share."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": arguments.steps,
        "learning_rate": 1e-5,
        "bf16": arguments.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1000,
        "disable_tqdm": True,
    }


def sft_variant(name: str, arguments: argparse.Namespace) -> Any:
    """A trainer of SFT on rows of random tokens."""
    loss, star = SFT_VARIANTS[name]
    generator = torch.Generator().manual_seed(0)
    answer = arguments.length - PROMPT_TOKENS
    rows = [
        {
            "input_ids": torch.randint(10, 49_000, (arguments.length,), generator=generator).tolist(),
            "completion_mask": [0] * PROMPT_TOKENS + [1] * answer,
            **({} if loss is None else {"star": [1.0] * PROMPT_TOKENS + [star] * answer}),
        }
        for _ in range(arguments.rows * arguments.steps)
    ]
    args = SFTConfig(
        **common(arguments),
        per_device_train_batch_size=arguments.rows,
        max_length=arguments.length,
        completion_only_loss=True,
    )
    make: Callable[..., Any] = SFTTrainer if loss is None else ShapedSFTTrainer
    trainer = make(
        policy(arguments),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(resolve_model(EMBEDDED_MODEL)),
        peft_config=lora(),
        **({} if loss is None else {"loss": loss}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def grpo_variant(name: str, arguments: argparse.Namespace) -> Any:
    """A trainer of GRPO with the embedded guard, by its verdict on the whole response or shaped by segments."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(EMBEDDED_MODEL))
    guard = load_guardrail(EmbeddedOptions())
    rows = [{"prompt": [{"role": "user", "content": text}], "kind": "harmful"} for text in PROMPTS]
    args = GRPOConfig(
        **common(arguments),
        per_device_train_batch_size=arguments.completions,
        num_generations=4,
        max_completion_length=arguments.tokens,
        generation_kwargs={"min_new_tokens": arguments.tokens},  # the same work in every step
        log_completions=False,
    )
    shared = {
        "model": policy(arguments),
        "args": args,
        "train_dataset": Dataset.from_list(rows * arguments.completions),
        "processing_class": tokenizer,
        "peft_config": lora(),
    }
    if name == "plain":
        whole = GuardReward(guard, tokenizer, SegmentOptions(size=1_000_000))
        trainer = GRPOTrainer(reward_funcs=[whole], **shared)
    else:
        trainer = ShapedGRPOTrainer(guard_reward=GuardReward(guard, tokenizer), **shared)
    trainer.remove_callback(PrinterCallback)
    return trainer


def memory(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Peak memory of each variant, each in a process of its own; the first is the plain one."""
    result: dict[str, Any] = {}
    for name in names:
        own = ["--memory-of", name, "--length", str(arguments.length), "--rows", str(arguments.rows)]
        own += ["--task-rows", str(arguments.task_rows)]
        command = [sys.executable, __file__, *own, "--dtype", arguments.dtype, "--steps", "2"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
        result[name] = json.loads(done.stdout.splitlines()[-1])
        result[name]["peak_ratio"] = round(result[name]["peak_mib"] / result[names[0]]["peak_mib"], 3)
        result[name]["allowed"] = ALLOWED["memory"].get(name)
        print(f"memory {name}: {result[name]}", flush=True)
    return result


def resident_mib(what: str) -> float:
    """This process's resident set now (VmRSS) or at its highest (VmHWM).

    The peak of `getrusage` begins at that of the process that started this one.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 2**10


def memory_of(arguments: argparse.Namespace) -> dict[str, float]:
    """MiB at the peak of training, and above what was taken before the first step."""
    part, _, name = arguments.memory_of.rpartition(":")
    trainer = (overhead_safegrad.safegrad_variant if part else sft_variant)(name, arguments)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        train(trainer)
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        before = resident_mib("VmRSS")
        train(trainer)
        peak = resident_mib("VmHWM")
    return {"peak_mib": round(peak, 1), "above_start_mib": round(peak - before, 1)}


if __name__ == "__main__":
    main()
