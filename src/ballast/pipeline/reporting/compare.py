"""Several runs beside each other, on one page."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ballast.errors import DataError
from ballast.pipeline.evaluation.metrics import EvaluationSummary
from ballast.pipeline.evaluation.tables import table_cells
from ballast.pipeline.reporting.chart import Curves, Intervals, Series, thinned
from ballast.pipeline.reporting.drawing import draw
from ballast.pipeline.reporting.page import render
from ballast.pipeline.reporting.report import PANELS
from ballast.pipeline.reporting.run_record import RunRecord
from ballast.pipeline.reporting.safeguards import facts, safeguards

Runs = Mapping[str, RunRecord]
Table = tuple[list[str], list[list[str]]]  # headings, and rows whose first cell is their label

_DASH = "–"
_CURVES = (
    ("reward", "Reward: weighted mean of the terms", "mean over the batch", "reward/total"),
    ("risk", "Mean risk of the completions trained on, by the guard", "mean risk", "risk/mean"),
    ("cosine", "Cosine of task and safety gradient (SafeGrad)", "cosine", "safegrad/cosine"),
    ("loss", "Loss", "loss", "loss"),
)


def named(runs: Sequence[RunRecord]) -> dict[str, RunRecord]:
    """Runs by the name that tells them apart: their folder's, with as much of the way there as that takes.

    Raises:
        DataError: a run is named twice.
    """
    paths = [run.folder.path.resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise DataError(f"run '{path}' is named twice; name each run once")
    ends = (["/".join(path.parts[-parts:]) for path in paths] for parts in itertools.count(1))
    return dict(zip(next(names for names in ends if len(set(names)) == len(names)), runs, strict=True))


def comparison_page(runs: Runs) -> str:
    """The page.

    Args:
        runs: by name.
    """
    return render(
        "compare.html.j2",
        styles=("style.css",),
        names=list(runs),
        outcome=table_cells(results(runs)),
        changes=changes_table(runs),
        pictures=[draw(chart) for chart in charts(runs)],
        facts=facts_table(runs),
        safeguards=safeguards_table(runs),
        timings=timings_table(runs),
        differences=differences_table(runs),
        same_suite=len({json.dumps(list(run.config.data.test)) for run in runs.values()}) == 1,
    )


def results(runs: Runs) -> list[tuple[str, EvaluationSummary]]:
    """The figures of each run's last model, the trained one or its repair, as tables take them."""
    return [(name, run.rows[-1][1]) for name, run in runs.items()]


def changes_table(runs: Runs) -> Table:
    """What each run changed: figures of the model that training started from, and of the run's result."""
    rows = []
    for name, run in runs.items():
        before, after = run.summaries[run.trained_from], run.rows[-1][1]
        cells = [name, f"{run.trained_from} → {run.rows[-1][0]}"]
        for figure in ("unsafe_share", "mean_risk", "refusal_scary", "refusal_ordinary", "coherent_share"):
            values = getattr(before, figure).value, getattr(after, figure).value
            cells.append(" → ".join(_DASH if value is None else f"{value:.2f}" for value in values))
        rows.append(cells)
    headings = ["run", "of", "unsafe share", "mean risk", "refused scary", "refused ordinary", "coherent"]
    return headings, rows


def charts(runs: Runs) -> list[Curves | Intervals]:
    """Figures of all runs in one picture each."""
    last = [summary for _, summary in results(runs)]
    panels = {title: tuple(getattr(summary, name) for summary in last) for title, name in PANELS.items()}
    found: list[Curves | Intervals] = [Intervals("outcome", "The runs' results, with intervals", tuple(runs), panels)]
    monitored = {
        name: [event for event in run.training.events if event["event"] in ("monitor_baseline", "monitor")]
        for name, run in runs.items()
    }
    safety = [
        Series(name, [(event["step"], event["figures"]["safety"]["value"]) for event in events])
        for name, events in monitored.items()
        if events
    ]
    if safety:
        found.append(Curves("safety", "Safety, by the monitor", "safety", tuple(safety), y_range=(0.0, 1.0)))
    for chart, title, label, key in _CURVES:
        lines = [
            Series(name, thinned(run.training.points(key)))
            for name, run in runs.items()
            if key in run.training.figures()
        ]
        if lines:
            found.append(Curves(chart, title, label, tuple(lines)))
    return found


def facts_table(runs: Runs) -> Table:
    """What was trained, a column a run."""
    return _columns(runs, {name: dict(facts(run.config)) for name, run in runs.items()})


def safeguards_table(runs: Runs) -> Table:
    """The safeguards that any of the runs used, a column a run."""
    used = {
        name: {one.name: one.settings or "yes" for one in safeguards(run.config) if one.used}
        for name, run in runs.items()
    }
    return _columns(runs, used)


def timings_table(runs: Runs) -> Table:
    """Seconds of each stage, a column a run."""
    return _columns(
        runs, {name: {one.stage: f"{one.seconds:,.0f} s" for one in run.timings} for name, run in runs.items()}
    )


def differences_table(runs: Runs) -> Table:
    """The keys of the configurations whose values differ, a column a run; the name of a run is none."""
    flat = {name: dict(_flat(run.config.model_dump(mode="json"))) for name, run in runs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values if key not in ("name", "out"))
    differing = [key for key in keys if len({values.get(key, _DASH) for values in flat.values()}) > 1]
    return _columns(runs, {name: {key: values.get(key, _DASH) for key in differing} for name, values in flat.items()})


def _columns(runs: Runs, values: Mapping[str, Mapping[str, str]]) -> Table:
    labels = dict.fromkeys(label for of_run in values.values() for label in of_run)
    rows = [[label, *(values[name].get(label, _DASH) for name in runs)] for label in labels]
    return ["", *runs], rows


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", json.dumps(value, ensure_ascii=False)))
    return pairs
