"""What `metrics.jsonl` says of one training: a line a step, and what happened in between.

The file is appended to by every call of a run. A training that was begun anew leaves the lines of the former one
behind, and one that was resumed makes the steps after its checkpoint again; what counts here is what led to the model.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.errors import DataError

Line = Mapping[str, Any]

_EVENTS = ("monitor_baseline", "monitor", "monitor_trip", "monitor_rollback", "monitor_lower_lr")


@dataclass(frozen=True)
class Training:
    """The lines of one training.

    Attributes:
        steps: the lines `step`, by rising step, which counts from 1.
        events: what the monitor saw and did, and resumptions, in order.
    """

    steps: tuple[Line, ...] = ()
    events: tuple[Line, ...] = ()

    @property
    def last(self) -> int:
        """The last step that was logged; 0 without any."""
        return self.steps[-1]["step"] if self.steps else 0

    def points(self, key: str) -> tuple[tuple[float, float | None], ...]:
        """(step, value) of one figure at every step that has it; None where a step could not tell it."""
        return tuple((line["step"], line[key]) for line in self.steps if key in line)

    def figures(self) -> set[str]:
        """The figures that any step has a value of."""
        return {key for line in self.steps for key, value in line.items() if isinstance(value, (int, float))}


def read_lines(path: Path) -> list[Line]:
    """All lines of a `metrics.jsonl`; none where there is no such file.

    Raises:
        DataError: a line is no JSON object.
    """
    if not path.is_file():
        return []
    lines: list[Line] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise DataError(
                f"line {number} of '{path}' cannot be read ({error}); remove that line, and run the stage again"
            ) from error
        lines.append(line)
    return lines


def training_of(lines: Iterable[Line], stage: str = "train") -> Training:
    """The training that made the present model of a stage."""
    former: list[Line] = []
    kept: list[Line] = []
    for line in lines:
        if line.get("stage") != stage:
            continue
        event = line["event"]
        if event == "stage_started":
            former, kept = kept, []
        elif event == "training_resumed":
            kept = [*(old for old in former if old["step"] <= line["step"]), line]
        elif event == "step" or event in _EVENTS:
            kept.append(line)
    return Training(
        tuple(line for line in kept if line["event"] == "step"), tuple(line for line in kept if line["event"] != "step")
    )
