"""report: what came of the run, to look at: start, aligned and final model, the training in between, its completions.

Writes `report.html`, which holds all of it and fetches nothing; `summary.md` with `charts/*.png`; and `summary.json`.
Prints the tables.
"""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from ballast.pipeline.context import RunContext
from ballast.pipeline.evaluation.measure import read_verdicts
from ballast.pipeline.evaluation.metrics import Comparison, compare
from ballast.pipeline.evaluation.tables import render_tables
from ballast.pipeline.monitoring.history import history_lines
from ballast.pipeline.reporting.report import PAGE, write_report
from ballast.pipeline.reporting.run_record import RunRecord, read_run
from ballast.pipeline.run_folder import versions, write_text


def run_stage(context: RunContext, folder: Path) -> None:
    """Put the measurements side by side, and draw the run."""
    run = read_run(context.folder.path, context.config)
    comparisons = _comparisons(run)
    context.console.print(render_tables(run.rows, context.console.width), highlight=False)
    lines = [describe(name, comparison) for name, comparison in comparisons.items()]
    lines += history_lines(context.folder.path / "train" / "monitor")
    for line in lines:
        context.say(line)
    summary = {
        "seed": context.config.seed,
        "rows": {label: asdict(summary) for label, summary in run.rows},
        "comparisons": {name: asdict(comparison) for name, comparison in comparisons.items()},
        "versions": versions(),
    }
    write_text(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False))
    with context.console.status("report: drawing"):
        write_report(run, folder, lines)
    context.say(f"Report: {escape(str(context.folder.path / 'report' / PAGE))}")
    context.say(f"Answers, risks and these tables: {escape(str(context.folder.path))}")


def _comparisons(run: RunRecord) -> dict[str, Comparison]:
    """Each model with the one before it, and the last with the first."""
    verdicts = {label: read_verdicts(path) for label, path in run.models.items()}
    labels = list(verdicts)
    pairs = list(itertools.pairwise(labels)) + ([(labels[0], labels[-1])] if len(labels) > 2 else [])
    return {
        f"{before} -> {after}": compare(
            verdicts[before], verdicts[after], run.config.seed, run.config.evaluate.interval
        )
        for before, after in pairs
    }


def describe(name: str, comparison: Comparison) -> str:
    """One line about a pair of models: the change of mean risk on harmful prompts, and its interval."""
    risk = comparison.risk
    if risk.value is None or risk.low is None or risk.high is None:
        return f"{name}: no harmful prompt was scored for both"
    certain = "" if risk.low <= 0 <= risk.high else ", which excludes 0"
    return f"{name}: mean risk on harmful prompts {risk.value:+.3f} (paired interval {risk.low:+.3f} to {risk.high:+.3f}{certain})"
