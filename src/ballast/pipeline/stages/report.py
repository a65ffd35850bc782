"""report: the tables of start, aligned and final model, and what changed between them.

Writes `summary.md` and `summary.json`, and prints the tables.
"""

import itertools
import json
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from ballast.pipeline.context import RunContext
from ballast.pipeline.evaluation.measure import read_verdicts
from ballast.pipeline.evaluation.metrics import Comparison, EvaluationSummary, compare
from ballast.pipeline.evaluation.tables import markdown_table, render_tables
from ballast.pipeline.monitoring.history import history_lines
from ballast.pipeline.run_folder import versions, write_text


def run_stage(context: RunContext, folder: Path) -> None:
    """Put the measurements side by side."""
    config = context.config
    evaluated = context.folder.stage("evaluate")
    sources = {"start": context.folder.stage("baseline") / "start"}
    if config.align.enabled:
        sources["after align"] = evaluated / "aligned"
    sources[f"after {config.train.method.upper()}"] = evaluated / "final"
    rows = [
        (label, EvaluationSummary.from_json(path.with_suffix(".json").read_text())) for label, path in sources.items()
    ]
    verdicts = {label: read_verdicts(path.with_suffix(".parquet")) for label, path in sources.items()}
    labels = list(sources)
    pairs = list(itertools.pairwise(labels)) + ([(labels[0], labels[-1])] if len(labels) > 2 else [])
    comparisons = {
        f"{before} -> {after}": compare(verdicts[before], verdicts[after], config.seed, config.evaluate.interval)
        for before, after in pairs
    }
    context.console.print(render_tables(rows, context.console.width), highlight=False)
    lines = [describe(name, comparison) for name, comparison in comparisons.items()]
    lines += history_lines(context.folder.path / "train" / "monitor")
    for line in lines:
        context.say(line)
    context.say(f"Answers, risks and these tables: {escape(str(context.folder.path))}")
    summary = {
        "seed": config.seed,
        "rows": {label: asdict(summary) for label, summary in rows},
        "comparisons": {name: asdict(comparison) for name, comparison in comparisons.items()},
        "versions": versions(),
    }
    write_text(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False))
    write_text(
        folder / "summary.md",
        f"# {config.name}\n\n{markdown_table(rows)}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n",
    )


def describe(name: str, comparison: Comparison) -> str:
    """One line about a pair of models: the change of mean risk on harmful prompts, and its interval."""
    risk = comparison.risk
    if risk.value is None or risk.low is None or risk.high is None:
        return f"{name}: no harmful prompt was scored for both"
    certain = "" if risk.low <= 0 <= risk.high else ", which excludes 0"
    return f"{name}: mean risk on harmful prompts {risk.value:+.3f} (paired interval {risk.low:+.3f} to {risk.high:+.3f}{certain})"
