"""A restored model written as a LoRA again: what it differs in, module by module, factored to a rank by SVD.

A transplant under a mask does not stay of low rank, so this loses something, and says how much.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ballast.errors import ConfigError, ModelError
from ballast.models import file_sha256
from ballast.pipeline.model_record import carry_record
from ballast.pipeline.restoration.adapters import WEIGHTS
from ballast.pipeline.restoration.low_rank import truncate
from ballast.pipeline.restoration.methods import LAYERS, Change, Method, Triple, is_matrix, matches
from ballast.pipeline.restoration.models import Models, fingerprint
from ballast.pipeline.restoration.output import copy_companions, output_folder
from ballast.pipeline.restoration.restore import Restored, notes_on, selection, write_restoration
from ballast.pipeline.restoration.weights import Factors, Weights, difference

LOST = "lora_error"  # |D - its LoRA|_F / |D|_F, among the figures of a tensor


@dataclass
class _Module:
    """One module of the LoRA, and the squared norms of what was to be said and of what was lost."""

    factors: Factors
    total: float
    lost: float


def restore_as_lora(
    method: Method,
    models: Models,
    out: Path,
    rank: int,
    device: str = "cpu",
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> Restored:
    """Apply a method and write the result as a LoRA: over what the tuned model is a LoRA over, or else over the base.

    Modules that the method leaves alone keep the factors of a tuned LoRA exactly; all others are factored to `rank`.
    All modules get one rank, the largest, with zeros in the rest.

    Args:
        method: what is done.
        models: from `open_models`.
        out: a new or an empty folder.
        rank: 1 or more.
        device: where it is computed.
        on_tensor: is told each tensor's name, how many are done and how many there are.

    Returns:
        As `restore` does; the figure `lora_error` of a tensor says what its factors lose, and a note what all do.

    Raises:
        ConfigError: `out` is not free, a rank below 1, or the method looks at no tensor of this model.
        ModelError: the models differ in what is no matrix of a linear module, such as a norm or the embedding.
        RestorationError: the folder cannot be written.
    """
    if rank < 1:
        raise ConfigError(f"lora_rank = {rank} holds nothing; give 1 or more, or leave it out to write a full model")
    over = models.tuned.base or models.base
    found: dict[str, _Module] = {}
    changed: dict[str, dict[str, float]] = {}
    kept: dict[str, dict[str, float]] = {}
    shared, selected = models.shared(), selection(method, models)
    chosen = frozenset(selected)
    names = [name for name in models.tuned.names if name in shared]
    with output_folder(out, [weights.folder for weights in models.each()], _size(models, rank)) as scratch:
        for done, name in enumerate(names, start=1):
            selects = name in chosen
            change = method.change(Triple(name, *_three(models), device)) if selects else Change(None)
            module = _factored(change, models.tuned, over, name, rank)
            if module is not None:
                found[name] = module
            if selects:
                lost = {} if module is None or not module.total else {LOST: math.sqrt(module.lost / module.total)}
                (kept if change.tensor is None else changed)[name] = {**change.figures, **lost}
            if on_tensor is not None:
                on_tensor(name, done, len(names))
        if not found:
            raise ConfigError(
                f"the result is {over.label} '{over.folder}' itself, so there is no LoRA to write; use that model"
            )
        width = _write(scratch, found, over)
        total, lost_all = sum(m.total for m in found.values()), sum(m.lost for m in found.values())
        share = math.sqrt(lost_all / total) if total else 0.0  # factors of a LoRA that has not learnt have no product
        note = (
            f"a LoRA of rank {width} over {over.label}; of the difference from it {share:.2%} is lost (Frobenius norm)"
        )
        notes = (note, *notes_on(selected, changed))
        restored = Restored(out, method.name, changed, kept, len(models.tuned.names) - len(selected), notes)
        _complete(scratch, method, models, restored)
    return restored


def _three(models: Models) -> tuple[Weights, Weights, Weights]:
    return models.base, models.aligned, models.tuned


def _size(models: Models, rank: int) -> int:
    shapes = [models.tuned.shape(name) for name in models.tuned.names]
    return sum(4 * rank * sum(shape) for shape in shapes if is_matrix(shape))


def _factored(change: Change, tuned: Weights, over: Weights, name: str, rank: int) -> _Module | None:
    """What one tensor needs; None where the result is `over` there."""
    if change.tensor is None:
        delta = difference(tuned, over, name)
    else:
        delta = change.tensor - over.tensor(name).to(change.tensor.device).float()
    if delta is None or (isinstance(delta, torch.Tensor) and not bool(delta.any())):
        return None
    if not (isinstance(delta, Factors) or (is_matrix(tuned.shape(name)) and matches(name, LAYERS))):
        raise ModelError(
            f"tensor '{name}' of tuned '{tuned.folder}' is another one than in {over.label} '{over.folder}', and a LoRA of linear "
            "modules cannot hold that; leave lora_rank out to write a full model"
        )
    if isinstance(delta, Factors):
        total = float(((delta.left.T @ delta.left) * (delta.right @ delta.right.T)).sum())  # |left right|_F^2
        return _Module(delta.to("cpu"), max(total, 0.0), 0.0)
    low = truncate(delta, rank)
    total = float(delta.double().square().sum())
    return _Module(low.factors().to("cpu"), total, max(0.0, 1.0 - low.energy) * total)


def _write(folder: Path, found: dict[str, _Module], over: Weights) -> int:
    """PEFT's two files; the rank of all modules."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    width = max(module.factors.right.shape[0] for module in found.values())
    stored = {}
    for name, module in found.items():
        left, right = module.factors.left, module.factors.right
        missing = width - right.shape[0]
        key = "base_model.model." + name.removesuffix(".weight")
        stored[f"{key}.lora_A.weight"] = torch.nn.functional.pad(right, (0, 0, 0, missing)).contiguous()
        stored[f"{key}.lora_B.weight"] = torch.nn.functional.pad(left, (0, missing)).contiguous()
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    LoraConfig(
        r=width,
        lora_alpha=width,  # scaling 1: it is in the factors
        target_modules=[name.removesuffix(".weight") for name in found],
        base_model_name_or_path=str(over.folder.resolve()),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))
    return width


def _complete(folder: Path, method: Method, models: Models, restored: Restored) -> None:
    """Tokenizer, prompt format and record, as a full result has them."""
    copy_companions(models.tuned, folder)
    for name in ("config.json", "generation_config.json"):  # a folder with a config is taken for a full model
        (folder / name).unlink(missing_ok=True)
    digests = {WEIGHTS: file_sha256(folder / WEIGHTS)}
    carry_record(models.tuned.folder, folder, digests)
    inputs = {weights.label: fingerprint(weights) for weights in models.each()}
    write_restoration(folder, restored, method, inputs, digests)
