"""`ballast serve` as a user starts it, for the tests that need the real thing."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KEY = "key"


@contextmanager
def started(folder: Path, *words: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A server of a model folder with a contract: its process and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["serve", str(folder), "--eager", "--max-model-len", "512", f"serve.port={port}", *words]
    process = subprocess.Popen(
        [sys.executable, "-m", "ballast.pipeline.cli", *command],
        env={**os.environ, "BALLAST_API_KEYS": KEY},
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if f"serving '{folder.name}'" in line:
                break
        else:
            pytest.fail("it did not start: " + "".join(said))
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def descendants(pid: int) -> list[tuple[int, list[str]]]:
    """Ids and command lines of all processes below one."""
    found: dict[int, list[tuple[int, bytes]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            found.setdefault(parent, []).append((int(path.parent.name), (path.parent / "cmdline").read_bytes()))
        except (FileNotFoundError, ProcessLookupError):
            continue
    below, todo = [], [pid]
    while todo:
        for child, line in found.get(todo.pop(), []):
            below.append((child, line.decode(errors="replace").split("\0")))
            todo.append(child)
    return below


def resident_mb(pid: int) -> float:
    """What a process holds in memory, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def sockets(pid: int) -> int:
    """How many sockets a process has open."""
    return sum(1 for fd in Path(f"/proc/{pid}/fd").iterdir() if str(fd.readlink()).startswith("socket:"))
