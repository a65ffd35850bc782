"""A file of rows through a guard: every risk written once, whole, and none lost when the work is interrupted.

While it runs, `OUT.partial` holds a line that says what is being done and a line for every row that is scored. The
next call with the same file, guard and cuts goes on from there and asks again for rows that were left unscored.
`OUT` appears at the end, whole.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ballast.errors import ConfigError
from ballast.guardrails.asking import ask
from ballast.guardrails.audit import ScoredRow
from ballast.guardrails.segments import SegmentOptions, cut_response
from ballast.guardrails.types import Guardrail, RiskTrace
from ballast.pipeline.guard_rows import InputRow
from ballast.pipeline.run_folder import write_text

SUFFIXES = (".jsonl", ".parquet")
Cutter = Callable[[str], tuple[int, ...]]


def read_cuts(text: str) -> Cutter:
    """Where responses are cut: `end`, `words:5`, `sentences`, `sentences:2`.

    Raises:
        ConfigError: another unit, or a size that is no whole number from 1.
    """
    unit, colon, size = text.partition(":")
    if unit == "end" and not colon:
        return lambda response: (len(response),)
    defaults = {"words": "5", "sentences": "1"}
    number = size if colon else defaults.get(unit, "")
    if unit not in defaults or not number.isdecimal() or int(number) < 1:
        raise ConfigError(f"--cuts {text}: no such way to cut a response; write end, words:5 or sentences:1")
    options = SegmentOptions.model_validate({"unit": unit, "size": int(number)})
    return lambda response: cut_response(response, options)


def score_rows(
    guard: Guardrail, rows: Sequence[InputRow], cut: Cutter, batch_size: int = 32
) -> Iterator[list[ScoredRow]]:
    """Judge rows, a batch at a time and in order.

    Raises:
        BallastError: what would fail on every row; see `ask`.
    """
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        traces = ask(guard, [row.exchange for row in batch], [cut(row.exchange.response) for row in batch])
        yield [ScoredRow(r.line, r.id, trace, r.category) for r, trace in zip(batch, traces, strict=True)]


def to_record(row: ScoredRow) -> dict[str, Any]:
    """One scored row as plain values: the columns of the output."""
    trace = row.trace
    return {
        "line": row.line,
        "id": row.id,
        "category": row.group,
        "peak_risk": row.peak,
        "cuts": list(trace.cuts),
        "risk": list(trace.risk),
        "reason": None if trace.reason is None else trace.reason.encode("utf-8", "backslashreplace").decode(),
        "label_mass": trace.label_mass,
        "guard_category": list(trace.category),
    }


def from_record(record: Mapping[str, Any]) -> ScoredRow:
    """The scored row of `to_record`."""
    trace = RiskTrace(
        tuple(record["cuts"]),
        tuple(record["risk"]),
        record["reason"],
        record["label_mass"],
        tuple(record["guard_category"]),
    )
    return ScoredRow(record["line"], record["id"], trace, record["category"])


def check_out(out: str) -> Path:
    """The path of an output that can be written.

    Raises:
        ConfigError: its ending says no known form, it is there already, or its folder cannot be made.
    """
    path = Path(out).expanduser()
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: its ending says no known form; end it in {' or '.join(SUFFIXES)}")
    if path.exists():
        raise ConfigError(f"--out {out}: it is there already; choose another name, or delete it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: its folder cannot be made ({error.strerror}); choose another") from None
    return path


@dataclass(frozen=True)
class Progress:
    """What an interrupted call left behind.

    Attributes:
        path: the file of it.
        scored: rows by line that need not be asked for again.
    """

    path: Path
    scored: dict[int, ScoredRow]


def open_progress(out: Path, task: Mapping[str, Any]) -> Progress:
    """Look for the rows that an earlier call scored.

    Args:
        out: the output.
        task: what is being done: file, guard and cuts. Rows of another task are not ours.

    Raises:
        ConfigError: the file of another task is there, or it cannot be read or written.
    """
    path = out.with_name(out.name + ".partial")
    head = json.dumps({"ballast guard score": task}, sort_keys=True)
    try:
        if not path.exists():
            write_text(path, head + "\n")
            return Progress(path, {})
        content = path.read_bytes()
        # The last line may be torn: the call was killed in the middle of it.
        whole = content[: content.rfind(b"\n") + 1]
        first, *lines = whole.decode("utf-8").splitlines() or [""]
        if first != head:
            raise ConfigError(
                f"'{path}' was begun with another file, guard or cuts; delete it, or choose another --out"
            )
        os.truncate(path, len(whole))
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be written ({error.strerror}); choose another --out") from None
    rows = [from_record(json.loads(line)) for line in lines]
    return Progress(path, {row.line: row for row in rows if row.trace.scored})


@contextmanager
def appending(progress: Progress) -> Iterator[Callable[[Sequence[ScoredRow]], None]]:
    """Append scored rows to the file of an interrupted call; each batch is in it before the next is asked for."""
    with progress.path.open("a", encoding="utf-8") as handle:

        def append(rows: Sequence[ScoredRow]) -> None:
            write_lines(handle, rows)
            handle.flush()

        yield append


def write_lines(handle: IO[str], rows: Sequence[ScoredRow]) -> None:
    """One JSON object a row."""
    for row in rows:
        handle.write(json.dumps(to_record(row), allow_nan=False) + "\n")


def finish(out: Path, progress: Progress, rows: Sequence[ScoredRow]) -> None:
    """Write the output, which appears whole or not at all, and remove what it was made from."""
    scratch = out.with_name(out.name + ".writing")
    if out.suffix == ".parquet":
        _write_parquet(scratch, rows)
    else:
        with scratch.open("w", encoding="utf-8") as handle:
            write_lines(handle, rows)
    scratch.replace(out)
    progress.path.unlink()


def _write_parquet(path: Path, rows: Sequence[ScoredRow]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "line": pa.int64(),
            "id": pa.string(),
            "category": pa.string(),
            "peak_risk": pa.float64(),
            "cuts": pa.list_(pa.int64()),
            "risk": pa.list_(pa.float64()),
            "reason": pa.string(),
            "label_mass": pa.float64(),
            "guard_category": pa.list_(pa.string()),
        }
    )
    pq.write_table(pa.Table.from_pylist([to_record(row) for row in rows], schema=schema), path)
