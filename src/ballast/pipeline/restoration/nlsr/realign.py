"""NLSR over whole models: find the safety neurons of every module, choose the layers that lost them, patch these.

Yi et al. 2024, arXiv 2412.12497. The first two need forwards of the super-aligned model on calibration rows; the
patching itself is a restoration method like the others, tensor by tensor. docs/nlsr.md has the formulas and where
this departs from the paper and from its code.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ballast.errors import ConfigError, ModelError
from ballast.pipeline.restoration.methods import Change, Triple, is_matrix, matches
from ballast.pipeline.restoration.models import Models, open_models
from ballast.pipeline.restoration.nlsr.activations import BUDGET_BYTES, CalibrationRow, passes, second_moments
from ballast.pipeline.restoration.nlsr.algebra import (
    Overlap,
    extrapolate,
    least_similar,
    overlap,
    safety_neurons,
    sampled,
    transplant,
)
from ballast.pipeline.restoration.nlsr.lora import restore_as_lora
from ballast.pipeline.restoration.nlsr.reference import AlignmentChanges, reference_model
from ballast.pipeline.restoration.nlsr.settings import NLSRSettings
from ballast.pipeline.restoration.output import check_output
from ballast.pipeline.restoration.restore import SHARD_BYTES, Restored, restore
from ballast.pipeline.restoration.weights import Factors, own_fp32

DEFAULT = NLSRSettings()
Progress = Callable[[str, int, int], None]

_NUMBERED = re.compile(r"^.*?\.\d+(?=\.)")


@dataclass(frozen=True)
class Examined:
    """What was found out about one module.

    Attributes:
        mask: its safety neurons, bits packed.
        shape: (m, n).
        overlap: of the tuned model's change with the reference's, under the mask.
    """

    mask: np.ndarray
    shape: tuple[int, int]
    overlap: Overlap

    def unpacked(self) -> torch.Tensor:
        """Bool, (m, n)."""
        bits = np.unpackbits(self.mask, count=self.shape[0] * self.shape[1])
        return torch.from_numpy(bits.astype(bool)).reshape(self.shape)


@dataclass(frozen=True)
class Realignment:
    """A restoration method whose masks and layers are found: it patches. See `methods.Method`.

    Attributes:
        options: the settings.
        examined: by tensor, what was found.
        similarity: by layer (see `NLSRSettings.unit`), the cosine of its masked changes.
        patched: the layers that are patched.
        tokens: calibration tokens that counted.
    """

    options: NLSRSettings
    examined: Mapping[str, Examined]
    similarity: Mapping[str, float]
    patched: tuple[str, ...]
    tokens: int

    name = "nlsr"

    def settings(self) -> dict[str, Any]:
        """See `Method`."""
        return {**self.options.record(), "calibration_tokens": self.tokens, "patched": self.patched}

    def selects(self, name: str, shape: Sequence[int]) -> bool:
        """See `Method`."""
        return name in self.examined

    def change(self, at: Triple) -> Change:
        """See `Method`."""
        found, layer = self.examined[at.name], layer_of(at.name, self.options.unit)
        mask = found.unpacked()
        figures = {"similarity": self.similarity[layer], "masked_share": float(mask.double().mean())}
        change = at.alignment()
        if layer not in self.patched or not self.options.strength or change is None or not mask.any():
            return Change(None, figures)
        reference = extrapolate(at.start(at.aligned), change, self.options.beta)
        return Change(transplant(at.start(at.tuned), reference, mask.to(at.device), self.options.strength), figures)

    def with_share(self, share: float) -> "Realignment":
        """The same neurons with another share of the layers patched; no model runs for it."""
        options = replace(self.options, share=share)
        return replace(self, options=options, patched=layers_to_patch(self.similarity, options))


def nlsr(
    base: str,
    aligned: str,
    tuned: str,
    *,
    rows: Sequence[CalibrationRow],
    out: str | Path,
    settings: NLSRSettings = DEFAULT,
    device: str = "cpu",
    batch_size: int = 8,
    shard_bytes: int = SHARD_BYTES,
    over: Mapping[str, str] | None = None,
    lora_rank: int | None = None,
    on_module: Progress | None = None,
) -> Restored:
    """Give a tuned model the safety neurons of its aligned ancestor back.

    Args:
        base: the model from before its alignment: a folder, a hub id or `embedded:...`.
        aligned: the aligned one, or a LoRA over the base.
        tuned: the one to repair, or a LoRA over one of the two.
        rows: harmful requests with safe answers, see `calibration_rows`.
        out: a new folder.
        settings: see there.
        device: where it is computed, such as `cuda`.
        batch_size: calibration rows a forward.
        shard_bytes: largest size of a weight file.
        over: see `open_models`.
        lora_rank: write a LoRA of this rank, see `restore_as_lora`; None writes a full model.
        on_module: is told each module's name, how many are examined and how many there are.

    Raises:
        ConfigError: `out` is not free, or nothing is selected.
        DataError: there are no calibration rows.
        ModelError: the models cannot be read or do not belong together, a tensor holds NaN, a module is not linear, or the
            alignment changed nothing.
        RestorationError: the result is not finite, or cannot be written.
    """
    models = open_models(base, aligned, tuned, over)
    check_output(Path(out), [weights.folder for weights in models.each()])  # before minutes of forwards
    method = realignment(models, rows, settings, device, batch_size, on_module=on_module)
    if lora_rank is not None:
        return restore_as_lora(method, models, Path(out), lora_rank, device)
    return restore(method, models, Path(out), device, shard_bytes)


def realignment(
    models: Models,
    rows: Sequence[CalibrationRow],
    settings: NLSRSettings = DEFAULT,
    device: str = "cpu",
    batch_size: int = 8,
    budget: int = BUDGET_BYTES,
    on_module: Progress | None = None,
) -> Realignment:
    """Find safety neurons and the layers to patch; nothing is written.

    Args:
        models: from `open_models`, with a tuned model.
        rows: see `nlsr`.
        settings: see `nlsr`.
        device: see `nlsr`.
        batch_size: see `nlsr`.
        budget: bytes that second moments may take at a time, see `activations.passes`.
        on_module: see `nlsr`.

    Raises:
        ConfigError: there is no tuned model, or nothing is selected.
        DataError: there are no calibration rows.
        ModelError: a tensor holds NaN, a module is not linear, or the alignment changed nothing.
    """
    if models.tuned is models.aligned:
        raise ConfigError(
            "nlsr restores what a tuned model has lost, and none is given; name it, or harden the aligned model with lox"
        )
    changes = AlignmentChanges(models, selected(models, settings), device)
    model = reference_model(models, changes, settings.beta, device)
    examined: dict[str, Examined] = {}
    for group in passes(changes.sides, budget):
        rights = {name.removesuffix(".weight"): changes.right(name) for name in group}
        moments = second_moments(model, rows, rights, batch_size)
        for name in group:
            examined[name] = _examine(changes, name, moments[name.removesuffix(".weight")], settings)
            if on_module is not None:
                on_module(name, len(examined), len(changes.sides))
    if not any(found.mask.any() for found in examined.values()) and settings.sparsity < 1.0:
        raise ModelError(
            f"aligned '{models.aligned.folder}' and base '{models.base.folder}' are the same in every module looked at, so there is no "
            "safety to restore from; give the model from before the alignment as base"
        )
    similarity = similarities({name: found.overlap for name, found in examined.items()}, settings.unit)
    chosen = layers_to_patch(similarity, settings)
    return Realignment(settings, examined, similarity, chosen, sum(len(row.ids) - row.start for row in rows))


def selected(models: Models, settings: NLSRSettings) -> list[str]:
    """Names of the matrices that are looked at: those that fit the patterns and that the alignment may have changed.

    Raises:
        ConfigError: there are none.
    """
    aligned = models.aligned
    fitting = [
        name
        for name in aligned.names
        if name.endswith(".weight") and is_matrix(aligned.shape(name)) and matches(name, settings.modules)
    ]
    names = [name for name in fitting if aligned.base is not models.base or aligned.differs(name)]
    if not names:
        why = "no matrix fits these patterns" if not fitting else f"the adapter '{aligned.folder}' has none of them"
        raise ConfigError(
            f"nlsr: modules = {', '.join(settings.modules)}: {why}; modules are patterns of tensor names such as "
            f"{next(name for name in aligned.names if is_matrix(aligned.shape(name)))}"
        )
    return names


def layer_of(name: str, unit: str) -> str:
    """The layer of a tensor, by `NLSRSettings.unit`."""
    match = _NUMBERED.match(name) if unit == "layer" else None
    return match.group() if match else name.removesuffix(".weight")


def similarities(overlaps: Mapping[str, Overlap], unit: str) -> dict[str, float]:
    """The cosine of each layer; several modules in one are taken as one long vector."""
    sums: dict[str, Overlap] = {}
    for name, one in overlaps.items():
        layer = layer_of(name, unit)
        sums[layer] = sums[layer] + one if layer in sums else one
    return {layer: total.cosine() for layer, total in sums.items()}


def layers_to_patch(similarity: Mapping[str, float], settings: NLSRSettings) -> tuple[str, ...]:
    """The layers that settings choose by their cosines."""
    if settings.choice == "rank":
        return least_similar(similarity, settings.share)
    return sampled(similarity, settings.share, settings.spread, settings.seed)


def _examine(changes: AlignmentChanges, name: str, moment: torch.Tensor, settings: NLSRSettings) -> Examined:
    change = changes.of(name)
    m, n = changes.models.aligned.shape(name)
    own = change.right.shape[0] if isinstance(change, Factors) else min(m, n)
    mask = (
        torch.zeros((m, n), dtype=torch.bool, device=changes.device)
        if settings.sparsity == 1.0
        else safety_neurons(change, moment, min(settings.rank or own, own), settings.sparsity)
    )
    dense = change.dense() if isinstance(change, Factors) else change
    tuned = own_fp32(changes.models.tuned.tensor(name)).sub_(changes.models.base.tensor(name).float())
    # W_e - W_0 is a multiple of this change, which a cosine does not see.
    together = overlap(tuned.to(changes.device), dense, mask)
    return Examined(np.packbits(mask.cpu().numpy()), (m, n), together)
