"""A folder that appears whole or not at all, and says of itself whether it still is.

FOLDER.partial/   while it is written
FOLDER/           whole: every file is on the disk, and manifest.json has the size and sha256 of each
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PARTIAL = ".partial"


@contextmanager
def whole_folder(target: Path, beside: frozenset[str] = frozenset()) -> Iterator[Path]:
    """A scratch folder that replaces `target`, with a manifest, when the block ends without an error.

    After an error the scratch folder is gone and `target` is as it was. After a kill or a power cut it is the former
    folder, the new one, or for a moment missing with the new one beside it as `.partial`; never a mixture.

    Args:
        target: the folder.
        beside: names of files that are left out of the manifest, since they may be changed later.

    Raises:
        OSError: the disk is full, or may not be written.
    """
    scratch = target.with_name(target.name + PARTIAL)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        (scratch / MANIFEST).write_text(json.dumps({"files": _contents(scratch, beside)}, indent=1))
        for path in sorted(scratch.rglob("*"), reverse=True):
            _sync(path)
        _sync(scratch)
        if target.exists():
            shutil.rmtree(target)  # a folder cannot be renamed onto one that holds files
        scratch.replace(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def damage(folder: Path, beside: frozenset[str] = frozenset()) -> str | None:
    """What is wrong with a folder of `whole_folder`, in words; None where it is whole.

    Args:
        folder: it.
        beside: names of files that were put there later and are not in the manifest.
    """
    try:
        written = json.loads((folder / MANIFEST).read_text())["files"]
        return _difference(written, _contents(folder, beside))
    except FileNotFoundError:
        return "it has no manifest.json"
    # The manifest itself may be damaged, and its JSON then of any shape.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__})"


def _difference(written: dict[str, dict[str, Any]], found: dict[str, dict[str, Any]]) -> str | None:
    if missing := sorted(set(written) - set(found)):
        return f"{missing[0]} is missing"
    for name, expected in written.items():
        if found[name]["bytes"] != expected["bytes"]:
            return f"{name} has {found[name]['bytes']} bytes instead of {expected['bytes']}"
        if found[name] != expected:
            return f"{name} is not what was written (sha256)"
    return None


def _contents(folder: Path, beside: frozenset[str] = frozenset()) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST or name in beside:
            continue
        with path.open("rb") as handle:
            files[name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}
    return files


def _sync(path: Path) -> None:
    """To the disk; a rename that overtakes the contents would leave an empty file under a good name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
