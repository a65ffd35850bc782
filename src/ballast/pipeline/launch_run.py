"""`ballast run CONFIG --launch FILE`: the stages that train in several processes, the others in one.

Each group of stages is a process of its own, so that engines and guards of one group leave no memory behind on the devices of the
next. The processes speak through the run folder, and each says itself what went wrong.
"""

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ballast.pipeline.launching import TRAINING, Launch

_GRACE_S = 60.0  # for a stage that was interrupted to end by itself


def commands(
    path: str, overrides: Sequence[str], stages: Sequence[str], launch: Launch, *, resume: bool, live: bool
) -> list[list[str]]:
    """The commands that make these stages, one after the other.

    Args:
        path: the run's configuration, as the command line takes it.
        overrides: `a.b=c`, as the command line takes them.
        stages: in order.
        launch: for those that train.
        resume: go on with an unfinished stage.
        live: draw a table of a training.
    """
    options = [*(["--resume"] if resume else []), *([] if live else ["--no-live"])]
    made = []
    for trains, group in itertools.groupby(stages, key=lambda name: name in TRAINING):
        asked = [part for name in group for part in ("--stage", name)]
        module = ["-m", "ballast.pipeline.cli", "run", path, *overrides, *asked, *options]
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(launch.path)]
        launcher += ["--num_processes", str(launch.processes)]
        made.append([sys.executable, *(launcher if trains else []), *module])
    return made


def run_commands(todo: Sequence[Sequence[str]]) -> int:
    """Run them up to the first that fails; gives its exit code, or 0."""
    for command in todo:
        with subprocess.Popen(command) as process, _ended_with_us(process):
            code = process.wait()
        if code:
            return code if code > 0 else 128 - code  # a signal, as a shell gives it
    return 0


@contextmanager
def _ended_with_us(process: "subprocess.Popen[Any]") -> Iterator[None]:
    """Whatever ends this process ends the other one, which is given time to end its own."""

    def end(number: int, frame: Any) -> None:
        process.terminate()

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        # An interrupt at a terminal has reached it, too.
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
