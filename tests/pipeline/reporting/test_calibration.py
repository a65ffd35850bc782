"""The calibrations of a run's guards in its report."""

import json

import pytest

from ballast.guardrails.calibrated import CalibratedOptions
from ballast.guardrails.calibration import Calibration
from ballast.guardrails.calibration_fit import CalibrationReport
from ballast.guardrails.reliability import Interval, Reliability
from ballast.pipeline.config_loading import load_config
from ballast.pipeline.reporting.calibration import calibration_chart, calibrations


@pytest.fixture
def fitted(tmp_path):
    """A calibration with its report beside it, as `ballast guard calibrate` leaves them."""
    path = tmp_path / "embedded.json"
    Calibration(guard="embedded", fingerprint="f", method="temperature", temperature=2.0, benign_floor=0.3).save(path)
    one = Interval(value=0.1, low=None, high=None)
    figures = Reliability(ece=one, brier=one, auroc=one)
    report = CalibrationReport(
        before=figures,
        after=figures,
        fitted_rows=9,
        held_out_rows=8,
        unscored=0,
        benign_at_zero=None,
        unsafe_at_zero=0.0,
    )
    path.with_suffix(".report.json").write_text(json.dumps({"seed": 0, "figures": report.model_dump(mode="json")}))
    return path


def config_with(path):
    config = load_config("demo")
    return config.model_copy(update={"guard": CalibratedOptions(guard=config.guard, calibration=str(path))})


def test_a_calibrated_guard_is_shown_with_its_role_and_the_figures_of_its_fit(fitted):
    (shown,) = calibrations(config_with(fitted))
    assert (shown.roles, shown.file, shown.problem) == (("rewards",), "embedded.json", "")
    assert shown.report is not None
    assert shown.report.held_out_rows == 8


def test_the_drawn_map_is_the_calibration(fitted):
    (shown,) = calibrations(config_with(fitted))
    chart = calibration_chart(shown, 1)
    assert chart is not None
    drawn = dict(chart.series[0].points)
    # sigmoid(logit(.5) / 2) = .5; at .1 it is sigmoid(-2.197 / 2) = .25, which the floor .3 takes to 0.
    assert drawn[0.5] == pytest.approx(0.5)
    assert drawn[0.1] == 0.0


def test_a_guard_without_a_calibration_has_none_to_show():
    assert calibrations(load_config("demo")) == []


def test_a_calibration_that_is_gone_is_told_and_stops_no_report(tmp_path):
    (shown,) = calibrations(config_with(tmp_path / "gone.json"))
    assert "no such file" in shown.problem
    assert calibration_chart(shown, 1) is None


def test_a_report_that_is_gone_is_told_and_the_map_is_still_drawn(fitted):
    fitted.with_suffix(".report.json").unlink()
    (shown,) = calibrations(config_with(fitted))
    assert "embedded.report.json" in shown.problem
    assert calibration_chart(shown, 1) is not None
