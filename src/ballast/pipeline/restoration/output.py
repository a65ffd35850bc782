"""Where a restored model goes: a folder that appears whole or not at all, with all that belongs to a model.

Beside the weights: config, generation config, tokenizer and chat template of the tuned model, the record of its
prompt format, `restoration.json`, which says what was done to it, and a card.
"""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ballast.errors import BallastError, ConfigError
from ballast.pipeline.checkpoints.manifest import PARTIAL, whole_folder
from ballast.pipeline.model_card import CARD
from ballast.pipeline.restoration.weights import Weights

RECORD = "restoration.json"

# What makes a folder of weights a model. An allow-list: training leaves much else beside them.
_OF_THE_MODEL = ("config.json", "generation_config.json", "LICENSE*", "NOTICE*")
_OF_THE_TEXT = (
    "tokenizer*", "*.tiktoken", "tekken.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.spm", "spiece.model", "sentencepiece*.model", "chat_template*", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip


class RestorationError(BallastError, RuntimeError):
    """A restored model could not be made or written; the inputs are as they were, and nothing is left half-way."""


def check_output(out: Path, inputs: Sequence[Path]) -> None:
    """The output is a new or an empty folder, and none of the inputs.

    Raises:
        ConfigError: it is not.
    """
    place = out.resolve()
    for folder in inputs:
        if folder.resolve() in (place, place.with_name(place.name + PARTIAL)) or place in folder.resolve().parents:
            raise ConfigError(
                f"out '{out}' is, or holds, the input '{folder}', which is never written over; choose another"
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"out '{out}' exists already{' and is not empty' if out.is_dir() else ' as a file'}; choose another"
        )


@contextmanager
def output_folder(out: Path, inputs: Sequence[Path], nbytes: int) -> Iterator[Path]:
    """A scratch folder beside `out` that becomes `out` when the block ends without an error, else is removed.

    Args:
        out: a new or an empty folder.
        inputs: folders that are read.
        nbytes: about how much will be written.

    Raises:
        ConfigError: `out` is not free, or the disk has less room than that.
        RestorationError: it cannot be written.
    """
    check_output(out, inputs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < nbytes:
            raise ConfigError(
                f"out '{out}' needs {_gb(nbytes)} and its disk has {_gb(free)} free; make room or choose another disk"
            )
        with whole_folder(out, beside=frozenset({CARD})) as scratch:
            yield scratch
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise RestorationError(
            f"'{out}' could not be written ({why}); make room or give write permission and run it again: the inputs are as they "
            "were, and nothing is left of the attempt"
        ) from error


def copy_companions(weights: Weights, folder: Path) -> None:
    """Copy all but the weights of a model: for a LoRA the model files of its base, and its own tokenizer if it has one."""
    if weights.base is not None:
        copy_companions(weights.base, folder)
    patterns = _OF_THE_TEXT if weights.base is not None else (*_OF_THE_MODEL, *_OF_THE_TEXT)
    for pattern in patterns:
        for path in sorted(weights.folder.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    templates = weights.folder / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
