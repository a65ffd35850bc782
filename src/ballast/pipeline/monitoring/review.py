"""What a person looks at after a trip: the answers that turned unsafe, and what was trained on since the last good point."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from ballast.pipeline import ranks
from ballast.pipeline.monitoring.answers import Measured
from ballast.pipeline.monitoring.trip import Sample
from ballast.pipeline.run_folder import writable


class SeenRows:
    """A data collator that remembers the rows it was given.

    The data loader collates a batch before it is trained on, so the rows of one batch more than was trained on are among
    them.

    Args:
        collator: the trainer's own, which does the work.
        tokenizer: turns token ids back into text, for rows that have no text.
    """

    def __init__(self, collator: Any, tokenizer: Any) -> None:
        self.collator = collator
        self.tokenizer = tokenizer
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._latest: dict[str, Mapping[str, Any]] = {}

    def __call__(self, features: Any) -> Any:
        """Collate."""
        rows = [
            {key: row[key] for key in ("prompt_id", "prompt", "kind", "input_ids") if key in row} for row in features
        ]
        # A group's completions share their row.
        self._latest = {repr(sorted(row.items())): row for row in rows}
        self._rows |= self._latest
        return self.collator(features)

    def forget(self) -> None:
        """Begin anew: the present point is a good one. The batch that was fetched ahead is trained on after it."""
        self._rows = dict(self._latest)

    def write(self, path: Path) -> int:
        """A line of JSON a row, of all processes that train together; gives how many."""
        # A group's completions may be spread over processes.
        rows = list(dict(ranks.collected([[key, dict(row)] for key, row in self._rows.items()])).values())
        for row in rows:
            if (ids := row.pop("input_ids", None)) is not None:
                row["text"] = self.tokenizer.decode(ids)
        _write_lines(path, rows)
        return len(rows)


def write_flipped(path: Path, baseline: Sample, now: Measured, threshold: float) -> list[str]:
    """The harmful prompts whose mean risk was below the threshold and no longer is, riskiest rise first.

    Args:
        path: a line of JSON a prompt is written here: id, risk_before, risk_now, prompt and answers.
        baseline: risks before training.
        now: the present sample.
        threshold: risk at which an answer counts as unsafe.

    Returns:
        Their ids.
    """
    flipped: list[tuple[float, dict[str, Any]]] = []
    for prompt, risks in now.risk.items():
        before = baseline.get(prompt)
        if risks and before and fmean(before) < threshold <= fmean(risks):
            answers = [c for c in now.completions if c.prompt_id == prompt]
            line = {
                "id": prompt,
                "risk_before": fmean(before),
                "risk_now": fmean(risks),
                "prompt": answers[0].prompt,
                "answers": [c.text for c in answers],
            }
            flipped.append((fmean(risks) - fmean(before), line))
    flipped.sort(key=lambda pair: -pair[0])
    _write_lines(path, [line for _, line in flipped])
    return [line["id"] for _, line in flipped]


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    ranks.on_main(lambda: _write(path, rows))


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
