"""What is kept does not outlive its starter, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ballast.pipeline.serving import keeper

# The command starts a child of its own, writes both ids, and waits.
COMMAND = """
import os, subprocess, sys, time
{ignore}
child = subprocess.Popen([sys.executable, "-c", {child!r}])
print(os.getpid(), child.pid, flush=True)
{then}
"""
CHILD = "import signal, time; {ignore}; time.sleep(60)"
IGNORE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def command(ignore="pass", then="time.sleep(60)"):
    return [sys.executable, "-c", COMMAND.format(ignore=ignore, then=then, child=CHILD.format(ignore=ignore))]


def kept(words):
    return subprocess.Popen(
        [sys.executable, "-P", keeper.__file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    )


def ids(process):
    return [int(word) for word in process.stdout.readline().split()]


def gone(pids, seconds=5.0):
    """Whether none of them runs; a zombie that nobody has waited for does not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def test_everything_ends_when_the_pipe_closes():
    process = kept(command())
    pids = ids(process)
    assert all(running(pid) for pid in pids)
    process.stdin.close()
    assert gone([process.pid, *pids])


def test_everything_ends_when_the_starter_is_killed():
    # A starter that gets no chance to close anything: kill -9.
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-P', sys.argv[1], *sys.argv[2:]],"
        "stdin=subprocess.PIPE, process_group=0); p.wait()"
    )
    starter = subprocess.Popen([sys.executable, "-c", code, keeper.__file__, *command()], stdout=subprocess.PIPE)
    pids = ids(starter)
    starter.kill()
    starter.wait()
    assert gone(pids)


def test_everything_ends_when_the_keeper_is_killed():
    process = kept(command(then="import signal; time.sleep(60)"))
    pids = ids(process)
    process.kill()
    process.wait()
    assert gone(pids[:1])  # the command is told by the system; its own children it ends itself, as vLLM does
    os.killpg(process.pid, signal.SIGKILL)


def test_what_does_not_listen_is_killed(monkeypatch):
    quick = Path(keeper.__file__).read_text().replace("_GRACE_S = 10.0", "_GRACE_S = 0.3")
    process = subprocess.Popen(
        [sys.executable, "-c", quick, *command(ignore=IGNORE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    )
    pids = ids(process)
    process.stdin.close()
    assert gone([process.pid, *pids])


def test_a_command_that_ends_leaves_its_exit_code_and_nothing_else():
    process = kept(command(then="sys.exit(3)"))
    pids = ids(process)
    assert process.wait(10) == 3
    assert gone(pids)
