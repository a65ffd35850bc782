"""Which charts a training has."""

from ballast.pipeline.config_monitor import MonitorConfig
from ballast.pipeline.evaluation.statistics import Estimate
from ballast.pipeline.reporting.chart import thinned
from ballast.pipeline.reporting.curves import marks_of, missing_figures, safety_curves, training_curves
from ballast.pipeline.reporting.metrics_log import Training
from ballast.pipeline.reporting.run_record import read_run


def training(**figures: float | None) -> Training:
    return Training(({"event": "step", "step": 1, **figures},))


def test_a_figure_that_no_step_has_is_not_drawn_and_is_named():
    curves = training_curves(training(**{"reward/total": 0.5, "risk/mean": 0.1, "kl": None}))
    assert [curve.name for curve in curves] == ["reward", "risk"]
    assert [what.split(" (")[0] for what in missing_figures(curves)] == ["KL", "cosine and conflict rate"]


def test_cosine_and_conflict_rate_share_a_chart_from_minus_one_to_one():
    (curve,) = training_curves(training(**{"safegrad/cosine": -0.2, "safegrad/conflict_rate": 0.5}))
    assert [series.label for series in curve.series] == ["cosine (SafeGrad)", "conflict rate"]
    assert curve.y_range == (-1.0, 1.0)


def test_every_reward_term_is_a_line_and_the_total_comes_first():
    (curve,) = training_curves(training(**{"reward/star": 0.5, "reward/total": 0.4, "reward/mine": 1.0}))
    assert [series.label for series in curve.series] == ["total (weighted mean of the terms)", "mine", "star"]


def test_a_rollback_is_marked_in_every_chart_of_the_training(make_run):
    run = read_run(make_run())
    for curve in training_curves(run.training):
        assert [mark.kind for mark in curve.marks] == ["evaluation", "trip", "rollback", "slower"]
    assert [mark.text for mark in marks_of(run.training)][2] == "step 6: back to the weights of step 0"


def test_safety_has_the_monitors_looks_its_bounds_and_the_test_prompts_at_both_ends(make_run):
    run = read_run(make_run())
    safety, refusals = safety_curves(
        run.training, run.config.monitor, run.summaries["after align"], run.summaries["after GRPO"]
    )
    monitored, tested = safety.series
    assert list(monitored.points) == [(0, 0.9), (6, 0.63)]
    # 1 - the judge's risk on harmful prompts: 1 - .4 where training started, 1 - .2 at its end.
    assert [x for x, _ in tested.points] == [0.0, 12.0]
    assert [round(y, 3) for _, y in tested.points] == [0.6, 0.8]
    # .95 and .85 of the baseline .9
    assert [round(y, 3) for y, _ in safety.levels] == [0.855, 0.765]
    assert "refused scary prompts, monitor" in [series.label for series in refusals.series]


def test_without_a_monitor_safety_has_the_test_prompts_alone(make_run):
    run = read_run(make_run())
    ends = run.summaries["after align"], run.summaries["after GRPO"]
    safety, _ = safety_curves(Training(), MonitorConfig(), *ends)
    assert [series.label for series in safety.series] == ["safety, test prompts"]
    assert safety.levels == ()


def test_the_interval_of_safety_is_that_of_risk_turned_round(make_run):
    run = read_run(make_run())
    summary = run.summaries["after GRPO"]
    risk: Estimate = summary.mean_risk
    safety, _ = safety_curves(Training(), MonitorConfig(), summary, summary)
    assert safety.series[-1].ends[0] == (1 - risk.high, 1 - risk.low)


def test_a_long_line_is_thinned_to_means_and_a_gap_stays_a_gap():
    # 6 points in groups of 2: (1 + 3) / 2; one of two is known; none is known.
    points = [(1, 1.0), (2, 3.0), (3, None), (4, 5.0), (5, None), (6, None)]
    assert thinned(points, most=3) == [(2, 2.0), (4, 5.0), (6, None)]
    assert thinned(points, most=6) == points
