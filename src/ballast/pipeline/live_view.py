"""A training at a glance: one table in the terminal that is drawn anew as lines of metrics.jsonl come.

It reads nothing but those lines, so that it shows what is on record.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

# Figures of a step, with their short names; TRL's own `reward` counts an unscored row's STAR as 0.
SHOWN = {
    "loss": "loss",
    "reward/total": "reward",
    "risk/mean": "risk",
    "risk/violation_rate": "unsafe",
    "risk/unscored_share": "unscored",
    "completions/mean_length": "length",
}


class Pace:
    """How fast a training goes, by the steps of this process alone: those before a resume cost it nothing.

    Args:
        step: optimizer steps done at the beginning.
        now: seconds of a clock that does not jump.
    """

    def __init__(self, step: int, now: float) -> None:
        self.step = step
        self.begun = now

    def elapsed(self, now: float) -> float:
        """Seconds since the beginning."""
        return now - self.begun

    def left(self, step: int, steps: int, now: float) -> float:
        """Seconds that the rest takes at the pace so far.

        Args:
            step: optimizer steps done.
            steps: of the whole training.
            now: the same clock's seconds.
        """
        return self.elapsed(now) / max(1, step - self.step) * (steps - step)


class LiveTable:
    """The table of one stage's training; a rich renderable.

    Args:
        stage: lines of other stages are passed over.
        clock: gives seconds.
    """

    def __init__(self, stage: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.stage = stage
        self.clock = clock
        self._pace = Pace(0, clock())
        self._step: Mapping[str, Any] = {}
        self._first: tuple[float, float] | None = None  # tokens and time of the first step seen
        self._tokens_per_s: float | None = None
        self._left: tuple[float, float] | None = None  # seconds left, and when that was
        self._safety = ""
        self._turned_back = 0
        self._last = ""

    def read(self, line: Mapping[str, Any]) -> None:
        """Take in one line of metrics.jsonl."""
        if line.get("stage") != self.stage:
            return
        now = self.clock()
        match line["event"]:
            case "step":
                self._read_step(line, now)
            case "training_resumed":
                self._pace = Pace(line["step"], now)
                self._last = f"step {line['step']}: resumed"
            case "monitor_baseline":
                self._safety = f"{line['figures']['safety']['value']:.3f}, the baseline"
            case "monitor":
                if line["relative"] is not None:
                    self._safety = f"{line['safety']:.3f}, {line['relative']:.0%} of the baseline"
                self._last = f"step {line['step']}: {line['reason']}"
            case "monitor_trip":
                self._last = f"step {line['step']}: the monitor tripped, {line['reason']}; {line['action']}"
            case "monitor_rollback":
                self._turned_back += 1
                self._last = f"step {line['step']}: back to the weights of step {line['to_step']}"
            case "monitor_lower_lr":
                self._last = f"step {line['step']}: learning rate at {line['scale']:.3g} of the configured one"
            case "checkpoint_failed":
                self._last = line["error"]

    def _read_step(self, line: Mapping[str, Any], now: float) -> None:
        self._step = line
        self._left = (self._pace.left(line["step"], line["steps"], now), now)
        if (tokens := line.get("num_tokens")) is None:
            return
        if self._first is None:
            self._first = (tokens, now)
        elif now > self._first[1]:
            self._tokens_per_s = (tokens - self._first[0]) / (now - self._first[1])

    def cells(self) -> dict[str, str]:
        """What is shown, by name, in order; a figure that is not known, such as the risk of an unscored step, is a dash."""
        now, step = self.clock(), self._step
        left = "-" if self._left is None else _duration(max(0.0, self._left[0] - (now - self._left[1])))
        cells = {"step": f"{step['step']}/{step['steps']}" if step else "-"}
        # What a kind of training never has, SFT a reward, gets no cell.
        cells |= {name: _figure(step[key]) for key, name in SHOWN.items() if key in step}
        if self._safety:
            cells |= {"safety": self._safety, "rollbacks": str(self._turned_back)}
        if self._tokens_per_s is not None:
            cells["tokens/s"] = f"{self._tokens_per_s:.0f}"
        return cells | {"time": _duration(self._pace.elapsed(now)), "left": left}

    def __rich__(self) -> Table:
        """Two pairs of name and value a line, and the last event below."""
        table = Table.grid(padding=(0, 2))
        for style in ("dim", "bold", "dim", "bold"):
            table.add_column(style=style)
        flat = [Text(part) for pair in self.cells().items() for part in pair]
        for start in range(0, len(flat), 4):
            table.add_row(*flat[start : start + 4])
        whole = Table.grid(padding=(0, 1))
        whole.add_row(table)
        if self._last:
            whole.add_row(Text(f"last: {self._last}", overflow="fold"))
        return whole


def _figure(value: Any) -> str:
    return "-" if value is None else f"{float(value):.3g}"


def _duration(seconds: float) -> str:
    """As in 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
