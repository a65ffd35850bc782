"""The report of one run: a page to look at, its charts as pictures, and a summary in Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ballast.pipeline.config_loading import dump_config
from ballast.pipeline.evaluation.tables import further_cells, markdown_table, table_cells, unscored_note
from ballast.pipeline.reporting.calibration import ShownCalibration, calibration_chart, calibrations
from ballast.pipeline.reporting.chart import Intervals
from ballast.pipeline.reporting.completions import select_completions, tokenizer_of
from ballast.pipeline.reporting.curves import marks_of, missing_figures, safety_curves, training_curves
from ballast.pipeline.reporting.drawing import Picture, draw
from ballast.pipeline.reporting.page import embedded_json, render
from ballast.pipeline.reporting.run_record import RunRecord
from ballast.pipeline.reporting.safeguards import facts, safeguards
from ballast.pipeline.run_folder import write_text

PAGE = "report.html"
CHARTS = "charts"

PANELS = {
    "unsafe share on harmful prompts": "unsafe_share",
    "mean risk, by the judge": "mean_risk",
    "mean risk, by the guard": "guard_risk",
    "refused: harmful prompts": "refusal_harmful",
    "refused: scary prompts": "refusal_scary",
    "refused: ordinary prompts": "refusal_ordinary",
}


def write_report(run: RunRecord, folder: Path, lines: Sequence[str]) -> None:
    """Write `report.html`, `summary.md` and `charts/*.png`.

    Args:
        run: the run.
        folder: where they go.
        lines: what changed between the models, in words.

    Raises:
        ModelError: the tokenizer beside the trained weights is not the one that the completions are from.
    """
    outcome = draw(outcome_chart(run))
    curves = safety_curves(run.training, run.config.monitor, run.summaries[run.trained_from], run.summaries[run.tuned])
    curves += training_curves(run.training)
    pictures = [draw(curve) for curve in curves]
    (folder / CHARTS).mkdir()
    for picture in (outcome, *pictures):
        (folder / CHARTS / f"{picture.name}.png").write_bytes(picture.png)
    most = run.config.report.completions
    selection = select_completions(run, most, tokenizer_of(run) if most else None)
    headings, rows = table_cells(run.rows)
    page = render(
        "report.html.j2",
        styles=("style.css", "completions.css"),
        script="completions.js" if selection.rows else None,
        run=run,
        outcome={"headings": headings, "rows": rows, "picture": outcome},
        further=further_cells(run.rows),
        note=unscored_note(run.rows),
        lines=lines,
        facts=facts(run.config),
        safeguards=safeguards(run.config),
        curves=pictures,
        marks=[mark.text for mark in marks_of(run.training) if mark.kind != "evaluation"],
        missing=missing_figures(curves),
        selection=selection,
        data=embedded_json(selection.rows),
        calibrations=[_calibration(shown, number) for number, shown in enumerate(calibrations(run.config), 1)],
        times=_times(run),
        config_text=dump_config(run.config),
    )
    write_text(folder / PAGE, page)
    write_text(folder / "summary.md", _markdown(run, lines, [outcome, *pictures]))


def outcome_chart(run: RunRecord) -> Intervals:
    """The measured models beside each other."""
    summaries = list(run.summaries.values())
    panels = {title: tuple(getattr(summary, name) for summary in summaries) for title, name in PANELS.items()}
    tasks = dict.fromkeys(name for summary in summaries for name in summary.task)
    panels |= {f"task: {name}": tuple(summary.task.get(name) for summary in summaries) for name in tasks}
    return Intervals("outcome", "The models beside each other, with intervals", tuple(run.summaries), panels)


def _calibration(shown: ShownCalibration, number: int) -> dict[str, Any]:
    """What the page shows of one calibration."""
    chart = calibration_chart(shown, number)
    rows: list[tuple[str, ...]] = []
    if shown.report is not None:
        before, after = shown.report.before, shown.report.after
        for label, name in (("ECE", "ece"), ("Brier", "brier"), ("AUROC", "auroc")):
            rows.append((label, *(_interval(getattr(of, name)) for of in (before, after)), ""))
        shares = shown.report.benign_at_zero, shown.report.unsafe_at_zero
        for label, share in zip(("benign rows at risk 0", "unsafe rows at risk 0"), shares, strict=True):
            rows.append((label, "", "–" if share is None else f"{share:.1%}", ""))
    return {"shown": shown, "picture": None if chart is None else draw(chart), "rows": rows}


def _interval(figure: Any) -> str:
    ends = "" if figure.low is None else f" [{figure.low:.3f}, {figure.high:.3f}]"
    return f"{figure.value:.3f}{ends}"


def _times(run: RunRecord) -> str:
    """What took the training's time, as far as its log says."""
    steps = run.training.steps
    told = []
    for key, what in (("step_time", "optimizer steps"), ("guard/seconds", "the guard's judgements")):
        seconds = [line[key] for line in steps if line.get(key) is not None]
        if seconds:
            told.append(f"{what} {sum(seconds):,.0f} s")
    looks = [event["seconds"] for event in run.training.events if event["event"] in ("monitor_baseline", "monitor")]
    if looks:
        told.append(f"the monitor's {len(looks)} measurements {sum(looks):,.0f} s")
    return f"Of the training: {'; '.join(told)}." if told else ""


def _markdown(run: RunRecord, lines: Sequence[str], pictures: Sequence[Picture]) -> str:
    """The summary: table, changes, safeguards, times, pictures."""
    used = [f"{one.name}{f' ({one.settings})' if one.settings else ''}" for one in safeguards(run.config) if one.used]
    parts = [
        f"# {run.config.name}",
        markdown_table(run.rows),
        _bullets(lines),
        "## What was trained",
        _bullets(f"{name}: {value}" for name, value in facts(run.config)),
        "## Safeguards",
        _bullets(used) if used else "None.",
        "## Times",
        _bullets(f"{one.stage}: {one.seconds:,.0f} s" for one in run.timings),
        "## Charts",
        "\n\n".join(f"![{picture.title}]({CHARTS}/{picture.name}.png)" for picture in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)
