"""One restoration from end to end: three models in, an ordinary checkpoint out, with a record of what was done to it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ballast
from ballast.errors import ConfigError
from ballast.pipeline.model_card import write_card
from ballast.pipeline.model_record import carry_record
from ballast.pipeline.restoration.card import restoration_card
from ballast.pipeline.restoration.methods import Change, Method, Triple
from ballast.pipeline.restoration.models import Models, fingerprint
from ballast.pipeline.restoration.output import RECORD, RestorationError, check_output, copy_companions, output_folder
from ballast.pipeline.restoration.shard_writer import write_shards
from ballast.pipeline.restoration.shards import TensorSpec
from ballast.pipeline.restoration.weights import all_finite

SHARD_BYTES = 5_000_000_000

# Matrices that hold several: a rank counts for all of them together.
_FUSED = ("qkv", "gate_up", "query_key_value", "c_attn")


@dataclass(frozen=True)
class Restored:
    """A restored model.

    Attributes:
        folder: where it is.
        method: name of what was done.
        changed: names of the tensors that were changed, with the figures of each.
        kept: names of the tensors that the method looked at and left as they were, with the figures of each.
        unselected: how many tensors it did not look at.
        notes: what the reader should know, a sentence each.
    """

    folder: Path
    method: str
    changed: Mapping[str, Mapping[str, float]]
    kept: Mapping[str, Mapping[str, float]]
    unselected: int
    notes: tuple[str, ...] = ()


def restore(
    method: Method,
    models: Models,
    out: Path,
    device: str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> Restored:
    """Apply a method to every tensor of the tuned model and write the result as a checkpoint.

    Memory is that of the largest tensor, a few times over in fp32; the inputs are mapped.

    Args:
        method: what is done.
        models: from `open_models`.
        out: a new or an empty folder.
        device: where it is computed, such as `cuda`.
        shard_bytes: largest size of a weight file.
        on_tensor: is told each tensor's name, how many are done and how many there are.

    Raises:
        ConfigError: `out` is not free, its disk too small, or the method looks at no tensor of this model.
        ModelError: a tensor holds NaN or infinity.
        RestorationError: the result is not finite, or cannot be written.
    """
    tuned = models.tuned
    specs = [TensorSpec(name, tuned.dtype(name), tuned.shape(name)) for name in tuned.names]
    inputs = [weights.folder for weights in models.each()]
    check_output(out, inputs)
    selected = selection(method, models)
    work = _Work(method, models, frozenset(selected), device, len(specs), on_tensor)
    with output_folder(out, inputs, sum(spec.nbytes for spec in specs)) as scratch:
        # Before the weights: a bad input is then found before much is computed.
        prints = {weights.label: fingerprint(weights) for weights in models.each()}
        digests = write_shards(scratch, specs, work.make, shard_bytes)
        copy_companions(tuned, scratch)
        carry_record(tuned.folder, scratch, digests)
        restored = work.restored(out, notes_on(selected, work.changed))
        write_restoration(scratch, restored, method, prints, digests)
    return restored


def write_restoration(
    folder: Path, restored: Restored, method: Method, inputs: Mapping[str, Any], digests: Mapping[str, str]
) -> None:
    """Write `restoration.json`, what was done to a model and to which, and the model's card.

    Args:
        folder: where they go, beside the weights and the record of the prompt format.
        restored: what came out.
        method: what was done.
        inputs: by label, what `fingerprint` says of each model that was read.
        digests: sha256 of each weight file that was written.
    """
    record = {
        "ballast": ballast.__version__,
        "torch": torch.__version__,
        "method": method.name,
        "settings": method.settings(),
        "inputs": inputs,
        "weights_sha256": digests,
        "changed": restored.changed,
        "kept": restored.kept,
        "unselected": restored.unselected,
        "notes": restored.notes,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_card(folder, restoration_card(restored.folder.name, record, folder))


def check_device(device: str) -> None:
    """The device is there.

    Raises:
        ConfigError: it is not.
    """
    try:
        torch.empty(1, device=device)
    # torch says it with a RuntimeError, an AssertionError or an error of its own, by the kind of device.
    except Exception as error:
        raise ConfigError(
            f"device '{device}' cannot be used ({str(error).splitlines()[0]}); choose cpu, or a device that `ballast doctor` lists"
        ) from error


@dataclass
class _Work:
    method: Method
    models: Models
    selected: frozenset[str]
    device: str
    total: int
    on_tensor: Callable[[str, int, int], None] | None
    changed: dict[str, Mapping[str, float]] = field(default_factory=dict)
    kept: dict[str, Mapping[str, float]] = field(default_factory=dict)
    done: int = 0

    def make(self, name: str) -> torch.Tensor:
        """The tensor of the result, on the CPU in the tuned model's dtype."""
        tuned = self.models.tuned
        change = self._change(name) if name in self.selected else None
        if change is None or change.tensor is None:
            kept = tuned.tensor(name)
            tensor = kept.to(tuned.dtype(name))
            if tensor.dtype != kept.dtype:  # a LoRA was merged in fp32
                self._check_result(tensor, name, "merging the LoRA", "give a base in bfloat16 or float32")
        else:
            tensor = change.tensor.to("cpu", tuned.dtype(name))
            what = f"{self.method.name} ({self.method.settings()})"
            self._check_result(tensor, name, what, "choose a smaller strength")
        self.done += 1
        if self.on_tensor is not None:
            self.on_tensor(name, self.done, self.total)
        return tensor

    def _change(self, name: str) -> Change:
        models = self.models
        change = self.method.change(Triple(name, models.base, models.aligned, models.tuned, self.device))
        (self.kept if change.tensor is None else self.changed)[name] = change.figures
        return change

    def _check_result(self, tensor: torch.Tensor, name: str, what: str, remedy: str) -> None:
        if not all_finite(tensor):
            raise RestorationError(
                f"tensor '{name}' would hold infinite values in {tensor.dtype} after {what}; {remedy}"
            )

    def restored(self, out: Path, notes: tuple[str, ...]) -> Restored:
        """What came out, when all tensors are made."""
        return Restored(out, self.method.name, self.changed, self.kept, self.total - len(self.selected), notes)


def selection(method: Method, models: Models) -> list[str]:
    """Names of the tensors that a method looks at.

    Raises:
        ConfigError: there are none.
    """
    tuned, shared = models.tuned, models.shared()
    selected = [
        name
        for name in tuned.names
        if name in shared and tuned.dtype(name).is_floating_point and method.selects(name, tuned.shape(name))
    ]
    if not selected:
        some = ", ".join(name for name in tuned.names if len(tuned.shape(name)) == 2)[:200]
        raise ConfigError(
            f"{method.name} looks at no tensor of this model with its settings {method.settings()}; modules are patterns of "
            f"tensor names, and only matrices count, such as {some}"
        )

    return selected


def notes_on(selected: Sequence[str], changed: Mapping[str, Any]) -> tuple[str, ...]:
    """What the reader should know of a restoration: fused matrices, and that nothing was changed."""
    notes = []
    if fused := [name for name in selected if any(part in name for part in _FUSED)]:
        notes.append(
            f"{len(fused)} matrices hold several in one ('{fused[0]}'): a rank counts for all of them together, so a larger one may be needed"
        )
    if not changed:
        notes.append("no tensor was changed: the strength is 0, or the models do not differ where the method looks")
    return tuple(notes)
