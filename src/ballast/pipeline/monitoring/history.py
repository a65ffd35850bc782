"""What a monitor saw and did, as a file of the stage and as lines of the report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ballast.pipeline import ranks
from ballast.pipeline.run_folder import writable, write_text

_FILE = "events.json"


def write_history(folder: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """Write all events so far, by the main process; the file is whole at every moment."""
    ranks.on_main(lambda: _write(folder, events))


def _write(folder: Path, events: Sequence[Mapping[str, Any]]) -> None:
    with writable(folder / _FILE):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _FILE, json.dumps(list(events), ensure_ascii=False))


def history_lines(folder: Path) -> list[str]:
    """The history as lines to read, none where there was no monitor.

    Args:
        folder: the monitor's folder in a finished stage.
    """
    path = folder / _FILE
    if not path.is_file():
        return []
    events = json.loads(path.read_text(encoding="utf-8"))
    lines = [line for event in events if (line := _line(event))]
    looks = [event for event in events if event["event"] == "monitor"]
    good = sum(event["outcome"] == "good" for event in looks)
    return [f"monitor: {good} of {len(looks)} evaluations good", *lines]


def _line(event: Mapping[str, Any]) -> str | None:
    step = event["step"]
    match event["event"]:
        case "monitor_trip":
            flipped, rows = len(event["flipped"]), event["rows"]
            return (
                f"monitor: tripped at step {step} ({event['reason']}), action {event['action']}; {flipped} prompts flipped and {rows} rows "
                f"to review in train/monitor/{event['review']}-*.jsonl"
            )
        case "monitor_rollback":
            return f"monitor: at step {step} back to the weights of step {event['to_step']}"
        case "monitor_lower_lr":
            return f"monitor: from step {step} on the learning rate is {event['scale']:.3g} of the configured one"
        case _:
            return None
