"""What a restoration costs: time and peak memory of LoX, Safe LoRA and RESTA over the size of the model.

    python benchmarks/restoration.py --sizes-gb 0.25 0.5 1 2 --out benchmarks/results/restoration.json
    python benchmarks/restoration.py --sizes-gb 0.01 --out /dev/stdout

Models of the Llama kind in bfloat16 and several shards: a base of random weights, an aligned one (base + rank 8 +
noise) and a tuned one (aligned + noise). With more gigabytes there are more layers, of the same width. Each
measurement is a process of its own.

Memory is anonymous memory (RssAnon of /proc/self/status, read every 5 ms) above what the interpreter holds with all
modules imported and torch's threads started; the mapped input files, which the system takes back when it needs room,
are not in it. Time has the hashes of the inputs in it. The inputs are in the page cache where it is large enough.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from demo_seeds import hardware

from ballast.pipeline.restoration.lox import Lox
from ballast.pipeline.restoration.methods import Method
from ballast.pipeline.restoration.models import open_models
from ballast.pipeline.restoration.restore import restore
from ballast.pipeline.restoration.safe_lora import SafeLora
from ballast.pipeline.restoration.shard_writer import write_shards
from ballast.pipeline.restoration.shards import Checkpoint, TensorSpec
from ballast.pipeline.restoration.task_arithmetic import Resta

# tau = 1 projects every matrix, the most that Safe LoRA can have to do.
METHODS: dict[str, Method] = {"lox": Lox(), "safe-lora": SafeLora(tau=1.0), "resta": Resta()}
SHARD_BYTES = 500_000_000
_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def main() -> None:
    """Make the models, measure, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes-gb", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0], help="of each model")
    parser.add_argument("--width", type=int, default=2048, help="of the hidden state; the MLP is four times as wide")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", type=Path, help="where the models are made; they take four times their size")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/restoration.json"))
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes_gb:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            make_models(Path(folder), size, arguments.width, arguments.vocabulary)
            for name in arguments.methods:
                rows.append(apart(name, Path(folder), arguments.device))
                row = rows[-1]
                print(
                    f"{row['gb']:.2f} GB  {name:9}  {row['seconds']:6.1f} s  {row['peak_mb']:5.0f} MB above the interpreter "
                    f"({row['peak_over_tensor']:.1f} times the largest tensor in fp32)",
                    file=sys.stderr,
                )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": {**hardware(), "gpu": gpu, "threads": torch.get_num_threads()},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def make_models(folder: Path, gb: float, width: int, vocabulary: int) -> None:
    """Three models of about this many gigabytes, written tensor by tensor."""
    specs = tensors(gb, width, vocabulary)
    for i, label in enumerate(("base", "aligned", "tuned")):
        (folder / label).mkdir()
        before = Checkpoint(folder / ("base", "aligned")[i - 1], "before") if i else None
        shapes = {spec.name: spec.shape for spec in specs}
        noise = Noise(seed=i)

        def make(name: str, shapes=shapes, before=before, noise=noise, aligned=label == "aligned") -> torch.Tensor:
            shape = shapes[name]
            if before is None:
                return noise(shape).mul_(0.02).bfloat16()
            change = noise(shape).mul_(0.001)
            if aligned and len(shape) == 2:
                left, right = (noise((side, 8)) for side in shape)
                change.addmm_(left, right.T, alpha=0.001)
            return change.add_(before.tensor(name)).bfloat16()

        write_shards(folder / label, specs, make, SHARD_BYTES)
        (folder / label / "config.json").write_text(json.dumps(_CONFIG))


class Noise:
    """Normal values from a pool, each time from another place: much faster than as many new ones."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(1_000_003, generator=self._generator)  # a prime, so that rows do not repeat

    def __call__(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Of this shape, in memory of its own."""
        size = torch.Size(shape).numel()
        start = int(torch.randint(len(self._pool), (1,), generator=self._generator))
        times = (start + size) // len(self._pool) + 1
        return self._pool.repeat(times)[start : start + size].reshape(shape).clone()


def tensors(gb: float, width: int, vocabulary: int) -> list[TensorSpec]:
    """Names and shapes of a Llama of this size: with one layer at least."""

    def spec(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name, torch.bfloat16, shape)

    layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 4, width),
        "self_attn.v_proj": (width // 4, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (4 * width, width),
        "mlp.up_proj": (4 * width, width),
        "mlp.down_proj": (width, 4 * width),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    ends = [
        spec("model.embed_tokens.weight", vocabulary, width),
        spec("lm_head.weight", vocabulary, width),
        spec("model.norm.weight", width),
    ]
    of_layer = [spec(name, *shape) for name, shape in layer.items()]
    rest = gb * 1e9 - sum(s.nbytes for s in ends)
    count = max(1, round(rest / sum(s.nbytes for s in of_layer)))
    layers = [spec(f"model.layers.{i}.{s.name}.weight", *s.shape) for i in range(count) for s in of_layer]
    return [*ends, *layers]


def apart(name: str, folder: Path, device: str) -> dict[str, Any]:
    """`measure` in a process of its own, which has forgotten nothing and holds nothing."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (name, str(folder), device))


def measure(name: str, folder: str, device: str) -> dict[str, Any]:
    """One restoration: seconds, and the largest anonymous memory above that of the start."""
    torch.linalg.qr(torch.randn(64, 64) @ torch.randn(64, 64))  # threads and libraries are there
    start = anonymous()
    peak, stop = [start], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = time.perf_counter()
    out = Path(folder) / name
    models = open_models(*(f"{folder}/{label}" for label in ("base", "aligned", "tuned")))
    restored = restore(METHODS[name], models, out, device=device, shard_bytes=SHARD_BYTES)
    seconds = time.perf_counter() - before
    stop.set()
    watcher.join()
    largest = max(4 * tensor_size(models.tuned.shape(tensor)) for tensor in models.tuned.names)
    written = list(out.glob("*.safetensors"))
    gb = sum(path.stat().st_size for path in written) / 1e9
    for path in written:
        path.unlink()
    errors = [figures["error"] for figures in restored.changed.values() if "error" in figures]
    return {
        "method": name,
        "gb": gb,
        "shards": len(written),
        "seconds": seconds,
        "peak_mb": (peak[0] - start) / 1e6,
        "peak_over_tensor": (peak[0] - start) / largest,
        "interpreter_mb": start / 1e6,
        "tensors_changed": len(restored.changed),
        "largest_svd_error": max(errors, default=None),
    }


def tensor_size(shape: tuple[int, ...]) -> int:
    """Values in a tensor."""
    return torch.Size(shape).numel()


def anonymous() -> int:
    """Bytes of this process's own memory, mapped files excluded."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux 4.5 or later")


if __name__ == "__main__":
    main()
