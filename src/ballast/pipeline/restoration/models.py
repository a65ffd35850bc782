"""From the names on the command line to `Weights`: full checkpoints, or adapters over one another."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ballast.errors import ConfigError, ModelError
from ballast.models import file_sha256, resolve_model
from ballast.pipeline.restoration.adapters import Adapter, adapter_config, is_adapter
from ballast.pipeline.restoration.shards import Checkpoint
from ballast.pipeline.restoration.weights import Weights, check_alike


@dataclass(frozen=True)
class Models:
    """The three models of a restoration, of one architecture.

    Attributes:
        base: from before the alignment.
        aligned: the safe one.
        tuned: the one to restore; the same object as `aligned` where that one is hardened.
    """

    base: Weights
    aligned: Weights
    tuned: Weights

    def each(self) -> list[Weights]:
        """Those that are different objects."""
        return [self.base, self.aligned, *([] if self.tuned is self.aligned else [self.tuned])]

    def shared(self) -> frozenset[str]:
        """Names of the tensors that all of them store; buffers that are computed anew may be in some files only."""
        return frozenset.intersection(*(frozenset(weights.names) for weights in self.each()))


def open_models(base: str, aligned: str, tuned: str | None = None, over: Mapping[str, str] | None = None) -> Models:
    """Open the models of a restoration and see that they belong together.

    Args:
        base: a model folder, a hub id or `embedded:...`; a full model.
        aligned: the same, or a LoRA over the base.
        tuned: the same, or a LoRA over the base or over the aligned model; None takes the aligned one.
        over: which model an adapter was trained on, by label (`{"tuned": "aligned"}`), where its own record names a
            folder that has been moved.

    Raises:
        ConfigError: `over` names what there is not.
        ModelError: a model cannot be read, has another architecture, or is an adapter of another base.
    """
    over = over or {}
    opened: dict[str, Weights] = {}
    given: dict[str, str] = {}
    for label, name in (("base", base), ("aligned", aligned), ("tuned", tuned)):
        if name is not None:
            opened[label] = _open(name, label, opened, given, over.get(label))
            given[label] = name
    first = opened["base"]
    for label in ("aligned", "tuned"):
        if label in opened:
            check_alike(opened[label], first)
    return Models(first, opened["aligned"], opened.get("tuned", opened["aligned"]))


def fingerprint(weights: Weights) -> dict[str, object]:
    """What a record says of an input: its folder, the sha256 of each of its weight files, and what it is a LoRA over."""
    record: dict[str, object] = {
        "folder": str(weights.folder),
        "weights_sha256": {path.name: file_sha256(path) for path in weights.files()},
    }
    return record if weights.base is None else {**record, "lora_over": weights.base.label}


def _open(name: str, label: str, opened: Mapping[str, Weights], given: Mapping[str, str], over: str | None) -> Weights:
    folder = Path(name).expanduser()
    if not is_adapter(folder):
        if over is not None:
            raise ConfigError(
                f"{label}_over = '{over}', and {label} '{name}' is a full model, which is over none; leave it out"
            )
        return Checkpoint(Path(resolve_model(name)), label)
    if not opened:
        raise ModelError(
            f"base '{name}' is an adapter, and the base must be a full model; give the model that it was trained on, or merge it"
        )
    return Adapter(folder, label, _base_of(folder, label, opened, given, over))


def _base_of(
    folder: Path, label: str, opened: Mapping[str, Weights], given: Mapping[str, str], over: str | None
) -> Weights:
    if over is not None:
        if over not in opened:
            raise ConfigError(f"{label}_over = '{over}': choose one of {', '.join(opened)}")
        return opened[over]
    said = str(adapter_config(folder, label).get("base_model_name_or_path") or "")
    for other, weights in opened.items():
        if said and (said == given[other] or Path(said).expanduser().resolve() == weights.folder.resolve()):
            return weights
    asked = " nor ".join(f"{other} '{given[other]}'" for other in opened)
    raise ModelError(
        f"{label} '{folder}' is an adapter of '{said}', which is {'neither ' if len(opened) > 1 else 'not '}{asked}; give its own "
        f"base, or, if that was only moved, say which it is: --{label}-over {list(opened)[-1]}"
    )
