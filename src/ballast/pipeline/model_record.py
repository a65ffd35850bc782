"""What a trained model folder says about itself: the hash of its weights and the prompt format of its training.

`prompt_format.json` stands beside the weights. It is checked before such a folder is trained on or measured,
so that a figure never belongs to weights, a template or a system prompt other than the recorded ones.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ballast.errors import ModelError
from ballast.models import file_sha256
from ballast.pipeline.prompting import PromptFormat

_FILE = "prompt_format.json"


def write_record(folder: Path, prompt_format: PromptFormat) -> None:
    """Write the record of a model folder whose weights are complete."""
    record = {
        "fingerprint": prompt_format.fingerprint(),
        "system_prompt": prompt_format.system_prompt,
        "weights_sha256": _weights_sha256(folder),
    }
    (folder / _FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")


def check_record(folder: Path, prompt_format: PromptFormat) -> None:
    """A model folder must still be what its record says; one without a record is taken as it is.

    Raises:
        ModelError: the record cannot be read, the weights are others, or this run's prompt format is another.
    """
    path = folder / _FILE
    if not path.is_file():
        return
    record = _read(path)
    _check_weights(folder, record["weights_sha256"])
    fingerprint, system_prompt = record["fingerprint"], record["system_prompt"]
    if fingerprint != prompt_format.fingerprint():
        said = "" if system_prompt == prompt_format.system_prompt else "its system prompt is another; "
        raise ModelError(
            f"model folder '{folder}' was trained under another prompt format than this run's ({said}fingerprint {fingerprint[:12]} in "
            f"{_FILE}, {prompt_format.fingerprint()[:12]} here); set prompting.system_prompt to the one in {_FILE} and use "
            "the tokenizer of that folder, or start from another model"
        )


def carry_record(source: Path, folder: Path, weights_sha256: Mapping[str, str]) -> None:
    """Write the record of a folder whose weights were made from those of `source` without a training.

    The prompt format stays that of `source`; without a record there, there is none here.

    Args:
        source: the folder that the weights were made from.
        folder: where they are now.
        weights_sha256: of each weight file in `folder`.

    Raises:
        ModelError: the record of `source` cannot be read, or its weights are not those it was written for.
    """
    path = source / _FILE
    if not path.is_file():
        return
    record = _read(path)
    _check_weights(source, record["weights_sha256"])
    record = {**record, "weights_sha256": dict(weights_sha256)}
    (folder / _FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {key: record[key] for key in ("fingerprint", "system_prompt", "weights_sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"'{path}' is no record of a model ({type(error).__name__}: {error}); make the model again by its stage, or "
            "remove the file if the folder is to be taken as it is"
        ) from error


def _check_weights(folder: Path, weights: Mapping[str, str]) -> None:
    found = _weights_sha256(folder)
    if found != weights:
        changed = sorted(name for name in found.keys() | weights.keys() if found.get(name) != weights.get(name))
        raise ModelError(
            f"model folder '{folder}': {', '.join(changed)} changed after training (sha256 differs from {_FILE}); restore the "
            "file or make the model again by its stage"
        )


def _weights_sha256(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}
