"""What a trained model folder says about itself: the hash of its weights and the template contract of its training.

`prompt_format.json` stands beside the weights, and without their hash in checkpoints and in the folders of stages. It is
checked before a folder is trained on, measured, gone on from or served, so that a figure or an answer never belongs to
weights, a template or a system prompt other than the recorded ones.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.errors import ModelError
from ballast.models import file_sha256
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.template_contract import TemplateContract, differences

RECORD = "prompt_format.json"


@dataclass(frozen=True)
class _Record:
    contract: TemplateContract
    fingerprint: str
    weights_sha256: Mapping[str, str] | None


def write_record(folder: Path, prompt_format: PromptFormat) -> None:
    """Write the record of a model folder whose weights are complete."""
    _write(folder, prompt_format.contract(), _weights_sha256(folder))


def write_contract(folder: Path, prompt_format: PromptFormat) -> None:
    """Write the contract into a folder that holds no model of its own: a checkpoint, or what a stage writes."""
    _write(folder, prompt_format.contract(), None)


def hold_contract(scratch: Path, earlier: Iterable[Path], prompt_format: PromptFormat) -> None:
    """Begin a stage, or go on with one: the contract is that of the stages before it, and is written down for those to come.

    Args:
        scratch: the stage's folder, with the contract of the process before this one where it goes on.
        earlier: the folders of the stages that it needs.
        prompt_format: the present one.

    Raises:
        ModelError: as `check_record`.
    """
    for folder in (*earlier, scratch):
        check_record(folder, prompt_format)
    write_contract(scratch, prompt_format)


def check_record(folder: Path, prompt_format: PromptFormat, serving: bool = False) -> None:
    """A folder must still be what its record says; one without a record is taken as it is.

    Args:
        folder: of a model, a checkpoint or a stage.
        prompt_format: the present one.
        serving: compare the serving system prompt, too.

    Raises:
        ModelError: the record cannot be read, the weights are others, or the prompt format is another; the message shows what
            differs, character by character.
    """
    path = folder / RECORD
    if not path.is_file():
        return
    record = _read(path)
    if record.weights_sha256 is not None:
        _check_weights(folder, record.weights_sha256)
    _check_contract(folder, record, prompt_format, serving)


def check_contract(folder: Path, prompt_format: PromptFormat, serving: bool = False) -> None:
    """As `check_record`, without the weights, whose hashing takes time."""
    path = folder / RECORD
    if path.is_file():
        _check_contract(folder, _read(path), prompt_format, serving)


def _check_contract(folder: Path, record: _Record, prompt_format: PromptFormat, serving: bool) -> None:
    found = prompt_format.contract()
    told = differences(record.contract, found, prompt_format.decode, serving)
    if not told and record.fingerprint != record.contract.fingerprint():
        told = [f"the fingerprint {record.fingerprint[:12]} is not that of the contract beside it, which was edited"]
    if told:
        raise ModelError(
            f"'{folder}' was made under another prompt format than the present one:\n  "
            + "\n  ".join(told)
            + f"\nA model answers otherwise, and less safely, under a template that it was not trained with. Put {_remedy(told)} back to "
            f"what {RECORD} in that folder says, or train under the present one (another name= for a run)."
        )


def _remedy(told: list[str]) -> str:
    prompt = any(line.startswith(("system_prompt", "serving_system_prompt", "policy")) for line in told)
    return "prompting.system_prompt" if prompt else "the tokenizer's files (chat_template.jinja, tokenizer*.json)"


def read_contract(folder: Path) -> TemplateContract | None:
    """The contract that a folder holds; None where it has none.

    Raises:
        ModelError: it cannot be read.
    """
    path = folder / RECORD
    return _read(path).contract if path.is_file() else None


def carry_record(source: Path, folder: Path, weights_sha256: Mapping[str, str]) -> None:
    """Write the record of a folder whose weights were made from those of `source` without a training.

    The contract stays that of `source`; without a record there, there is none here.

    Args:
        source: the folder that the weights were made from.
        folder: where they are now.
        weights_sha256: of each weight file in `folder`.

    Raises:
        ModelError: the record of `source` cannot be read, or its weights are not those it was written for.
    """
    path = source / RECORD
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        weights = dict(record["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    _check_weights(source, weights)
    _dump(folder, {**record, "weights_sha256": dict(weights_sha256)})


def _write(folder: Path, contract: TemplateContract, weights: Mapping[str, str] | None) -> None:
    record: dict[str, Any] = {"fingerprint": contract.fingerprint(), "contract": contract.to_json()}
    _dump(folder, record if weights is None else {**record, "weights_sha256": weights})


def _dump(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")


def _read(path: Path) -> _Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        weights = record.get("weights_sha256")
        if weights is not None and not isinstance(weights, dict):
            raise TypeError("weights_sha256 is no mapping")
        return _Record(TemplateContract.from_json(record["contract"]), str(record["fingerprint"]), weights)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"'{path}' is no record of a model ({type(error).__name__}: {error}); make the model again by its stage, or "
        "remove the file if the folder is to be taken as it is"
    )


def _check_weights(folder: Path, weights: Mapping[str, str]) -> None:
    found = _weights_sha256(folder)
    if found != weights:
        changed = sorted(name for name in found.keys() | weights.keys() if found.get(name) != weights.get(name))
        raise ModelError(
            f"model folder '{folder}': {', '.join(changed)} changed after training (sha256 differs from {RECORD}); restore the "
            "file or make the model again by its stage"
        )


def _weights_sha256(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}
