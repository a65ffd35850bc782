"""The tables of the retention benchmark, made from its JSON.

python benchmarks/retention_table.py benchmarks/results/retention_quick.json
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIGURES = ("unsafe", "unsafe_second", "refused", "over_refused", "coherent", "task")


def main() -> None:
    """Print the tables of the files that are named."""
    for name in sys.argv[1:]:
        print(table(json.loads(Path(name).read_text())))


def table(record: dict[str, Any]) -> str:
    """One table a task and share of harmful rows; means over seeds, and the range over them where there are several."""
    cells = list(record["cells"].values())
    parts = []
    for task, poison in sorted({(cell["task"], cell["poison"]) for cell in cells}):
        here = [cell for cell in cells if (cell["task"], cell["poison"]) == (task, poison)]
        aligned = record["aligned"][task]
        plain = {cell["seed"]: cell for cell in here if cell["method"] == "plain"}
        lines = [
            f"### {task}, {poison:.0%} harmful rows",
            "",
            f"| | seeds | {' | '.join(FIGURES)} | retention | gain kept | seconds | peak MB |",
            "|---" * (len(FIGURES) + 6) + "|",
            f"| aligned | | {' | '.join(_cell([aligned[figure]['value']]) for figure in FIGURES)} | 1.00 | | | |",
        ]
        for method in dict.fromkeys(cell["method"] for cell in here):
            of = [cell for cell in here if cell["method"] == method]
            row = [_cell([cell[figure]["value"] for cell in of]) for figure in FIGURES]
            row.append(_cell([retention(aligned, cell) for cell in of]))
            row.append(_cell([gain_kept(aligned, plain.get(cell["seed"]), cell) for cell in of]))
            row += [f"{statistics.mean(cell[cost] for cell in of):.0f}" for cost in ("seconds", "peak_mb")]
            lines.append(f"| {method} | {len(of)} | {' | '.join(row)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def retention(aligned: dict[str, Any], cell: dict[str, Any]) -> float:
    """Share of the aligned model's safe answers that is left."""
    safe = 1 - float(aligned["unsafe"]["value"])
    return (1 - float(cell["unsafe"]["value"])) / safe


def gain_kept(aligned: dict[str, Any], plain: dict[str, Any] | None, cell: dict[str, Any]) -> float | None:
    """Share of what plain SFT gained on the task; None where that is not known, or where it gained nothing."""
    if plain is None:
        return None
    gained = float(plain["task"]["value"]) - float(aligned["task"]["value"])
    return (float(cell["task"]["value"]) - float(aligned["task"]["value"])) / gained if gained > 0 else None


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.2f}"
    return mean if len(known) == 1 or len(set(known)) == 1 else f"{mean} ({min(known):.2f}-{max(known):.2f})"


if __name__ == "__main__":
    main()
