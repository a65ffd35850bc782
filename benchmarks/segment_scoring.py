"""One guard, the same texts, every engine that runs here: what scoring all segments of a response costs.

    python benchmarks/segment_scoring.py --out benchmarks/results/segment_scoring.json
    python benchmarks/segment_scoring.py --lengths 128 --cuts 32t --dtypes float32 --engines one_pass kv_fork

The guard is the embedded model under the default template of the family `prompted`; the texts are answers to
harmless requests that Ballast ships, joined until they have N tokens. `--cuts 5w` cuts every 5 words, `16t`
every 16 of the guard's tokens. Every cell has texts of its own, so that no engine finds them in a cache.

Seconds are the wall clock's; CPU seconds are this process's, all threads together, and hardly change when the
machine is busy with something else. Tokens are those that went through the model, padding included (vLLM does
not tell). A difference is that of two risks, at most 1.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from demo_seeds import hardware
from transformers import AutoTokenizer

from ballast.errors import BallastError
from ballast.guardrails.engines.build import build_engine, load_causal, local_engine
from ballast.guardrails.engines.interface import Labels, Verdict, VerdictEngine
from ballast.guardrails.engines.options import KVForkOptions, OnePassOptions, PerPrefixOptions, VLLMEngineOptions
from ballast.guardrails.families.prompted import PromptedGuard, PromptedOptions
from ballast.guardrails.segments import cut_tokens, cut_words, token_char_ends
from ballast.models import EMBEDDED_MODEL, resolve_model

LOCAL = {"per_prefix": PerPrefixOptions(), "one_pass": OnePassOptions(), "kv_fork": KVForkOptions()}
REFERENCE = "per_prefix"


@dataclass(frozen=True)
class Cell:
    """The texts of one length, cut in one way, as rendered prompts."""

    length: int
    cuts: str
    groups: list[list[list[int]]]


@dataclass(frozen=True)
class Measured:
    """One engine on one cell."""

    engine: str
    dtype: str
    length: int
    cuts: str
    prompts: int
    tokens: int | None
    seconds: float
    cpu_seconds: float
    speed_up: float | None  # over per_prefix, by the wall clock
    cpu_speed_up: float | None
    largest_difference: float | None  # from per_prefix


def main() -> None:
    """Run the engines one after the other; write the JSON after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=[*LOCAL, "vllm"], choices=[*LOCAL, "vllm"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], help="tokens of a response")
    parser.add_argument(
        "--cuts", nargs="+", default=["5w", "8t", "16t", "32t"], help="5w: every 5 words; 16t: every 16 tokens"
    )
    parser.add_argument("--texts", type=int, default=1, help="responses in a cell")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/segment_scoring.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": {
            **hardware(),
            "threads": arguments.threads,
            "device": arguments.device,
            "torch": torch.__version__,
        },
        "model": EMBEDDED_MODEL,
        "measured": [],
        "failed": {},
    }
    labels, cells = prepare(arguments.lengths, arguments.cuts, arguments.texts)
    # The reference goes first, since the others are told against it.
    engines = sorted(arguments.engines, key=lambda name: name != REFERENCE)
    for dtype in arguments.dtypes:
        wanted: dict[tuple[int, str], tuple[Measured, list[list[Verdict]]]] = {}
        for name in engines:
            try:
                for measured in run(name, dtype, labels, cells, arguments.device, wanted):
                    print(line(measured), flush=True)
                    record["measured"].append(asdict(measured))
            except BallastError as error:
                record["failed"][f"{name} {dtype}"] = str(error)
                print(f"{name} {dtype}: {error}", flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def prepare(lengths: Sequence[int], cuts: Sequence[str], texts: int) -> tuple[Labels, list[Cell]]:
    """The guard's labels and every cell's prompts."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(EMBEDDED_MODEL))
    guard = PromptedGuard(PromptedOptions(model=EMBEDDED_MODEL))
    renderer = guard.renderer(tokenizer)
    safe, unsafe = (tuple(sorted(renderer.label_ids(spellings))) for spellings in guard.spellings())
    rows = map(
        json.loads, (resources.files("ballast.data") / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    )
    requests = [row for row in rows if row["kind"] != "harmful"]
    cells = []
    for number, (length, cut) in enumerate((length, cut) for length in lengths for cut in cuts):
        groups = []
        for i in range(texts):
            start = 7 * (number * texts + i) % len(requests)
            chosen = requests[start:] + requests[:start]
            text, ends = answer(tokenizer, [row["response"] for row in chosen], length)
            size = int(cut[:-1])
            offsets = cut_words(text, size) if cut.endswith("w") else cut_tokens(ends, size, len(text))
            question = ({"role": "user", "content": chosen[0]["prompt"]},)
            groups.append([renderer.render(question, text[:offset])[0] for offset in offsets])
        cells.append(Cell(length, cut, groups))
    return Labels(safe, unsafe), cells


def answer(tokenizer: Any, parts: Sequence[str], length: int) -> tuple[str, list[int]]:
    """A text of `length` tokens, and the character offset where each of them ends."""
    ids = tokenizer.encode(" ".join(parts), add_special_tokens=False)[:length]
    return token_char_ends(tokenizer, ids)


def run(
    name: str,
    dtype: str,
    labels: Labels,
    cells: Sequence[Cell],
    device: str,
    wanted: dict[tuple[int, str], tuple[Measured, list[list[Verdict]]]],
) -> Iterator[Measured]:
    """One engine on every cell. The reference's answers are put into `wanted`."""
    tokens: list[int] = []
    engine = make(name, dtype, labels, device, tokens)
    engine.score([[[5] * 40 + [6] * i for i in range(1, 5)]])  # the first call allocates
    for cell in cells:
        tokens.clear()
        started, cpu = time.perf_counter(), time.process_time()
        verdicts = engine.score(cell.groups)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        known = wanted.get((cell.length, cell.cuts))
        measured = Measured(
            engine=name,
            dtype=dtype,
            length=cell.length,
            cuts=cell.cuts,
            prompts=sum(map(len, cell.groups)),
            tokens=sum(tokens) or None,
            seconds=round(seconds, 3),
            cpu_seconds=round(cpu_seconds, 3),
            speed_up=round(known[0].seconds / seconds, 2) if known else None,
            cpu_speed_up=round(known[0].cpu_seconds / cpu_seconds, 2) if known else None,
            largest_difference=largest(known[1], verdicts) if known else None,
        )
        if name == REFERENCE:
            wanted[cell.length, cell.cuts] = measured, verdicts
        yield measured
    if name == "vllm":
        engine.close()  # type: ignore[attr-defined]
    del engine
    gc.collect()


def make(name: str, dtype: str, labels: Labels, device: str, tokens: list[int]) -> VerdictEngine:
    """An engine whose forwards write the tokens that they run into `tokens`."""
    common = {"batch_size": 16, "guard": "benchmark"}
    if name == "vllm":
        options = VLLMEngineOptions(max_model_len=1024)
        return build_engine(
            options, model=EMBEDDED_MODEL, revision=None, labels=labels, dtype=dtype, device=device, **common
        )
    model, context = load_causal(EMBEDDED_MODEL, None, dtype=dtype, device=device, guard="benchmark")
    model.register_forward_pre_hook(lambda _, __, named: tokens.append(named["input_ids"].numel()), with_kwargs=True)
    return local_engine(LOCAL[name], model, labels, context=context, **common)


def largest(wanted: Sequence[Sequence[Verdict]], got: Sequence[Sequence[Verdict]]) -> float:
    """The largest difference of two risks.

    Raises:
        TypeError: a prompt is unscored, which no engine here may leave.
    """
    pairs = ((a.risk, b.risk) for want, row in zip(wanted, got, strict=True) for a, b in zip(want, row, strict=True))
    return max(abs(a - b) for a, b in pairs)


def line(m: Measured) -> str:
    """A row of the table."""
    told = (
        "" if m.speed_up is None else f" {m.speed_up:5.1f}x {m.cpu_speed_up:5.1f}x cpu  diff {m.largest_difference:.1e}"
    )
    return (
        f"{m.dtype:8} N={m.length:<4} {m.cuts:>3} {m.prompts:4} prompts {m.engine:10} "
        f"{m.tokens if m.tokens is not None else '-':>7} tokens {m.seconds:8.2f} s {m.cpu_seconds:8.2f} cpu s{told}"
    )


if __name__ == "__main__":
    main()
