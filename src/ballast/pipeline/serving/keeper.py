"""Runs one command that does not outlive whoever started this; a script of the standard library alone.

    python -P keeper.py COMMAND...

Standard input is a pipe whose other end only the starter holds. When it closes, however the starter ended (a kill -9
included), the whole process group is told to end, and killed where it does not. When the command ends by itself, so do
this and all that the command has left behind, with its exit code.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_GRACE_S = 10.0
_LOOK_S = 0.2  # between two looks at the command
_PR_SET_PDEATHSIG = 1


def _die_with_the_keeper() -> None:
    """In the child: end when the keeper itself is killed, which no pipe tells the child of. Linux alone has this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _others() -> bool:
    """Whether the group holds a process besides this one that has not ended."""
    group, own = os.getpgrp(), os.getpid()
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():  # noqa: PTH208, PTH112 (no imports for a script)
        if name.isdigit() and int(name) != own:
            try:
                with open(f"/proc/{name}/stat", "rb") as handle:  # noqa: PTH123
                    state, _, pgrp = handle.read().rpartition(b")")[2].split()[:3]
            except OSError:  # it ended in between
                continue
            if int(pgrp) == group and state not in (b"Z", b"X"):
                return True
    return False


def _end(command: "subprocess.Popen[bytes]") -> None:
    """End all of the group but this process: first asked, then killed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(os.getpgrp(), signal.SIGTERM)
    until = time.monotonic() + _GRACE_S
    while time.monotonic() < until:
        if command.poll() is not None and not _others():
            return
        time.sleep(0.05)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # this process, too: nothing is left to do


def main() -> None:
    """Start the command, and wait for its end or the starter's."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, preexec_fn=_die_with_the_keeper)

    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    while command.poll() is None and not asked:
        readable, _, _ = select.select([0], [], [], _LOOK_S)
        if readable and not os.read(0, 4096):  # closed
            break
    _end(command)
    code = command.poll()
    sys.exit(0 if code is None else code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
