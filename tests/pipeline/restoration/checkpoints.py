"""Small checkpoints made of random arrays: what lies on the disk is all that a restoration sees of a model."""

import json
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = 2
SHAPES = {
    "model.embed_tokens.weight": (12, 8),
    **{
        f"model.layers.{i}.{name}.weight": shape
        for i in range(LAYERS)
        for name, shape in {
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "mlp.up_proj": (16, 8),
            "mlp.down_proj": (8, 16),
            "input_layernorm": (8,),
        }.items()
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (12, 8),
}
MATRICES = tuple(name for name, shape in SHAPES.items() if ".layers." in name and len(shape) == 2)
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 12, "tie_word_embeddings": False}

Arrays = dict[str, np.ndarray]


def arrays(seed: int, like: Arrays | None = None, step: float = 0.1) -> Arrays:
    """Random weights in fp32, near those of `like`."""
    rng = np.random.default_rng(seed)
    start = like or dict.fromkeys(SHAPES, 0.0)
    return {name: (start[name] + step * rng.normal(size=SHAPES[name])).astype(np.float32) for name in SHAPES}


def save(folder: Path, tensors: Arrays, config: dict[str, Any] | None = None) -> str:
    """A checkpoint in one file."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    return str(folder)


def save_shards(folder: Path, tensors: Arrays, each: int = 4) -> str:
    """A checkpoint of several files under an index."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    names = list(tensors)
    listed = {}
    for i in range(0, len(names), each):
        file = f"part-{i:03d}.safetensors"
        save_file({name: tensors[name] for name in names[i : i + each]}, folder / file)
        listed |= dict.fromkeys(names[i : i + each], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def load(folder: Path) -> Arrays:
    """Every tensor of a written checkpoint, by safetensors' own reader."""
    from safetensors.numpy import load_file

    found: Arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def lora(
    folder: Path,
    base: str,
    seed: int,
    rank: int = 3,
    alpha: int = 6,
    names: tuple[str, ...] = MATRICES,
    **settings: Any,
) -> tuple[str, Arrays]:
    """A LoRA folder as PEFT writes it, and its differences in float64, made here from B, A and the scaling."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    scaling = alpha / (np.sqrt(rank) if settings.get("use_rslora") else rank)
    stored, deltas = {}, {}
    for name in names:
        m, n = SHAPES[name]
        a, b = (0.3 * rng.normal(size=shape).astype(np.float32) for shape in ((rank, n), (m, rank)))
        module = "base_model.model." + name.removesuffix(".weight")
        stored |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        deltas[name] = scaling * b.astype(np.float64) @ a.astype(np.float64)
    folder.mkdir(parents=True)
    save_file(stored, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder), deltas


def low_rank(delta: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of rank k, by numpy in float64."""
    u, s, vh = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Within 1e-5 of it, relative to its size as a whole."""
    return float(np.linalg.norm(found - wanted)) <= 1e-5 * float(np.linalg.norm(wanted))


class Three:
    """Base, aligned and tuned checkpoints on the disk, and their arrays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base_arrays = arrays(1, step=1.0)
        self.aligned_arrays = arrays(2, self.base_arrays)
        self.tuned_arrays = arrays(3, self.aligned_arrays)
        self.base = save(folder / "base", self.base_arrays)
        self.aligned = save(folder / "aligned", self.aligned_arrays)
        self.tuned = save(folder / "tuned", self.tuned_arrays)


def save_tiny_models(folder: Path, model: Any, tokenizer: Any) -> None:
    """base, aligned and tuned as `model` with its tokenizer; the last two differ from the base in linear modules alone."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name in ("base", "aligned", "tuned"):
        if name != "base":
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "_proj" in key:
                        parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
