"""Safetensors checkpoints, written tensor by tensor.

All names, dtypes and shapes are known beforehand: the header of a shard goes first, and each tensor follows as soon
as it is made. So a checkpoint of any size is written in the memory of its largest tensor, where safetensors' own
`save_file` takes a whole shard at once.

The format (safetensors 0.8): 8 bytes, little endian, the length of the header; the header in JSON, padded with
spaces to a multiple of 8; the tensors without gaps.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ballast.pipeline.restoration.shards import DTYPES, INDEX, SINGLE, TensorSpec

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def plan_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Share tensors out to shards of at most `shard_bytes`; one that is larger is a shard of its own.

    The order is kept from shard to shard. Within one, wider dtypes come first, so that each tensor is aligned.
    """
    shards: list[list[TensorSpec]] = []
    size = 0
    for spec in specs:
        if not shards or size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return [sorted(shard, key=lambda spec: -spec.dtype.itemsize) for shard in shards]


def write_shards(
    folder: Path,
    specs: Sequence[TensorSpec],
    make: Callable[[str], torch.Tensor],
    shard_bytes: int,
) -> dict[str, str]:
    """Write a checkpoint's weights, and their index where there are several shards.

    Args:
        folder: it exists.
        specs: what will be written.
        make: gives each tensor, once, when its turn comes.
        shard_bytes: largest size of a shard.

    Returns:
        sha256 of each weight file, by its name.

    Raises:
        OSError: the disk is full, or may not be written.
    """
    shards = plan_shards(specs, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    digests = {name: _write_shard(folder / name, shard, make) for name, shard in zip(names, shards, strict=True)}
    if len(shards) > 1:
        listed = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
            "weight_map": dict(sorted(listed.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digests


def _write_shard(path: Path, specs: Sequence[TensorSpec], make: Callable[[str], torch.Tensor]) -> str:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        head = struct.pack("<Q", len(text)) + text
        file.write(head)
        digest.update(head)
        for spec in specs:
            tensor = make(spec.name)
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise ValueError(f"{spec} was announced, and a {tensor.dtype} of shape {tuple(tensor.shape)} came")
            # view() of a scalar into another itemsize is not allowed, hence the reshape.
            values = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            file.write(values)
            digest.update(values)
    return digest.hexdigest()
