"""`ballast guard score`: one call from the file to the risks, and to the audit of the data set."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from ballast.errors import ConfigError, GuardError
from ballast.guardrails.audit import Audit, ScoredRow, audit, audit_markdown
from ballast.guardrails.registry import licence_of, load_guardrail
from ballast.guardrails.types import Guardrail
from ballast.pipeline.guard_rows import STDIN, Columns, InputRow, read_rows
from ballast.pipeline.guard_scoring import (
    Cutter,
    appending,
    check_out,
    finish,
    open_progress,
    read_cuts,
    score_rows,
    write_lines,
)
from ballast.pipeline.quiet import quiet_libraries
from ballast.pipeline.run_folder import write_text


@dataclass(frozen=True)
class Job:
    """What to judge, by what, and where the answers go.

    Attributes:
        file: JSON lines; `-` is standard input.
        options: of the guard.
        cuts: as `read_cuts` takes them.
        columns: names of the file's columns.
        out: file of the risks; None writes them to standard output, or nowhere with a report.
        report: JSON file of the audit, its page beside it; None makes none.
        threshold: risk in [0, 1] from which a row is risky.
        batch_size: rows handed to the guard at a time.
    """

    file: str
    options: BaseModel
    cuts: str
    columns: Columns
    out: str | None
    report: str | None
    threshold: float
    batch_size: int


def run_job(job: Job) -> None:
    """Judge the file and write what was asked for.

    Whatever can be refused is refused before the guard is loaded.

    Raises:
        ConfigError: cuts, output or report that cannot be used.
        DataError: a file or a line that cannot be read.
        GuardError: not one row could be scored.
    """
    cut = read_cuts(job.cuts)
    out = check_out(job.out) if job.out else None
    pages = _pages(job.report) if job.report else None
    rows, digest = read_rows(job.file, job.columns)
    guard = load_guardrail(job.options)
    quiet_libraries()
    started = time.perf_counter()
    if out is None:
        # Risks in the way of a report on the terminal help nobody.
        each = (lambda _: None) if pages else (lambda batch: write_lines(sys.stdout, batch))
        scored = _score(guard, rows, cut, job.batch_size, each)
        _check_scored(guard, scored)
    else:
        scored = _score_into(out, guard, rows, cut, job, digest)
    unscored = sum(not row.trace.scored for row in scored)
    _say(f"{len(rows)} rows, {unscored} of them not wholly scored, {time.perf_counter() - started:.1f} s")
    if pages:
        name = "standard input" if job.file == STDIN else Path(job.file).name
        _publish(audit(scored, guard.name, licence_of(job.options), job.threshold), name, pages)


def _score_into(
    out: Path, guard: Guardrail, rows: Sequence[InputRow], cut: Cutter, job: Job, digest: str
) -> list[ScoredRow]:
    task = {
        "sha256": digest,
        "guard": job.options.model_dump(mode="json"),
        "cuts": job.cuts,
        "columns": dataclasses.asdict(job.columns),
    }
    before = open_progress(out, task)
    left = [row for row in rows if row.line not in before.scored]
    if before.scored:
        _say(f"{len(before.scored)} of {len(rows)} rows were scored before and are kept")
    with appending(before) as append:
        fresh = {row.line: row for row in _score(guard, left, cut, job.batch_size, append)}
    scored = [fresh.get(row.line) or before.scored[row.line] for row in rows]
    _check_scored(guard, scored)
    finish(out, before, scored)
    return scored


def _score(
    guard: Guardrail,
    rows: Sequence[InputRow],
    cut: Cutter,
    batch_size: int,
    each: Callable[[Sequence[ScoredRow]], None],
) -> list[ScoredRow]:
    scored: list[ScoredRow] = []
    with progress(len(rows)) as advance:
        for batch in score_rows(guard, rows, cut, batch_size):
            each(batch)
            scored += batch
            advance(len(batch))
    return scored


def _check_scored(guard: Guardrail, scored: Sequence[ScoredRow]) -> None:
    if all(row.peak is None for row in scored):
        raise GuardError(
            f"guardrail '{guard.name}' could not score one of {len(scored)} rows (the first: {scored[0].trace.reason}); "
            "see what it answers with `ballast guard check`, and call this again"
        )


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of `total` rows on standard error, moved by the rows that are done; silent outside a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True) if console.is_terminal else nullcontext()
    with bar:
        if isinstance(bar, Progress):
            task = bar.add_task("", total=total)
            yield lambda done: bar.advance(task, done)
        else:
            yield lambda done: None


def _pages(report: str) -> tuple[Path, Path]:
    """The JSON file of the audit and its page."""
    path = Path(report).expanduser()
    if path.suffix != ".json":
        raise ConfigError(f"--report {report}: the audit is a JSON file with a page beside it; end it in .json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--report {report}: its folder cannot be made ({error.strerror}); choose another") from None
    return path, path.with_suffix(".md")


def _publish(found: Audit, source: str, pages: tuple[Path, Path]) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    page = audit_markdown(found, source)
    write_text(pages[0], json.dumps({"source": source, **found.to_dict()}, indent=2) + "\n")
    write_text(pages[1], page + "\n")
    Console().print(Markdown(page))


def _say(line: str) -> None:
    print(line, file=sys.stderr)
