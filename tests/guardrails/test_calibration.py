"""A calibration is a monotone map of [0, 1], measured on prompts it never saw, and bound to one guard."""

import functools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast.errors import ConfigError, DataError
from ballast.guardrails.calibrated import (
    CalibratedGuard,
    CalibratedOptions,
    CalibratedStreamingGuard,
    calibrate_guard,
    guard_fingerprint,
)
from ballast.guardrails.calibration import Calibration
from ballast.guardrails.calibration_fit import fit_calibration
from ballast.guardrails.contract import check_guardrail
from ballast.guardrails.families.ensemble import EnsembleOptions
from ballast.guardrails.families.prompted import PromptedOptions
from ballast.guardrails.registry import PluginOptions, guard_options, load_guardrail
from ballast.guardrails.reliability import measure
from ballast.guardrails.rules import RulePattern, RulesOptions
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.types import Exchange, StreamingGuardrail

BOUND = {"guard": "g", "fingerprint": "f"}
HELLO = Exchange(({"role": "user", "content": "Hello"},), "one two three")
risks = st.floats(0, 1, width=32)


def temperature(value, floor=0.0):
    return Calibration(**BOUND, method="temperature", temperature=value, benign_floor=floor)


def rows(n=400, overconfidence=3.0, seed=0):
    """Risks that are `overconfidence` times too sure: P(unsafe) = sigmoid(z), risk = sigmoid(overconfidence * z)."""
    generator = np.random.default_rng(seed)
    z = generator.normal(0, 1.5, n)
    unsafe = generator.random(n) < 1 / (1 + np.exp(-z))
    risk = 1 / (1 + np.exp(-overconfidence * z))
    return risk.tolist(), unsafe.tolist(), [f"prompt {i // 2}" for i in range(n)]


def fit(risk, unsafe, prompts, **options):
    return fit_calibration(risk, unsafe, prompts=prompts, **BOUND, **options)


@settings(deadline=None)
@given(st.lists(risks, min_size=2, max_size=8), st.floats(0.05, 20))
def test_temperature_keeps_the_order_and_stays_in_the_unit_interval(values, t):
    mapped = [temperature(t)(value) for value in sorted(values)]
    assert all(0.0 <= value <= 1.0 for value in mapped)
    assert mapped == sorted(mapped)


@settings(deadline=None)
@given(st.floats(0.001, 0.999), st.floats(0.001, 0.998), st.floats(0.5, 5))
def test_temperature_keeps_every_difference(low, step, t):
    high = low + (1 - low) * step
    if high - low > 1e-6:
        assert temperature(t)(high) > temperature(t)(low)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 0.99), st.floats(0.05, 20))
def test_the_floor_makes_zeros_and_changes_nothing_else(risk, floor, t):
    plain = temperature(t)(risk)
    assert temperature(t, floor)(risk) == (0.0 if plain <= floor else plain)


@functools.cache
def isotonic(seed):
    return fit(*rows(120, seed=7), method="isotonic", seed=seed)[0]


@settings(deadline=None)
@given(st.integers(0, 3), risks, risks)
def test_isotonic_never_inverts_the_order_and_stays_in_the_unit_interval(seed, a, b):
    calibration = isotonic(seed)
    low, high = calibration(min(a, b)), calibration(max(a, b))
    assert 0.0 <= low <= high <= 1.0


def test_temperature_divides_the_logit():
    # logit(0.8) = ln 4; ln 4 / 2 = ln 2; sigmoid(ln 2) = 2 / 3
    assert temperature(2.0)(0.8) == pytest.approx(2 / 3)
    assert temperature(2.0)(0.0) == 0.0
    assert temperature(2.0)(1.0) == 1.0
    assert temperature(0.02)(5e-324) == 0.0  # no overflow in either tail
    assert temperature(0.02)(math.nextafter(1, 0)) == 1.0


def test_isotonic_is_the_pooled_share_of_each_block():
    # A hundred prompts a risk: shares .1 .4 .2 .9 -> .4 and .2 violate the order and pool to .3.
    shares = {0.1: 0.1, 0.2: 0.4, 0.3: 0.2, 0.8: 0.9}
    risk = [r for r in shares for _ in range(100)]
    unsafe = [i < 100 * share for share in shares.values() for i in range(100)]
    # Each row twice, as two prompts of the same kind: one half of the split would miss the shares by chance, so
    # nearly all prompts fit.
    calibration, _ = fit(risk * 4, unsafe * 4, list(range(1600)), method="isotonic", benign_quantile=None, held_out=0.1)
    assert calibration(0.1) == pytest.approx(0.1, abs=0.03)
    assert calibration(0.2) == calibration(0.3) == pytest.approx(0.3, abs=0.03)
    assert calibration(0.8) == pytest.approx(0.9, abs=0.03)
    # Between .3 and .8 the line: half way at .55.
    assert calibration(0.55) == pytest.approx((calibration(0.3) + calibration(0.8)) / 2)
    assert calibration(1.0) == calibration(0.8)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_overconfidence_is_undone_on_prompts_that_took_no_part(method):
    calibration, report = fit(*rows(4000), method=method, benign_quantile=None)
    assert report.after.ece.value < 0.04 < report.before.ece.value
    assert report.after.brier.value < report.before.brier.value
    assert report.after.auroc.value == pytest.approx(report.before.auroc.value, abs=0.02)
    assert report.before.auroc.low < report.before.auroc.value < report.before.auroc.high
    if method == "temperature":
        assert calibration.temperature == pytest.approx(3.0, rel=0.1)


def test_the_floor_is_the_quantile_of_benign_rows_and_its_price_is_reported():
    risk, unsafe, prompts = rows(4000)
    calibration, report = fit(risk, unsafe, prompts, benign_quantile=0.9)
    assert report.benign_at_zero == pytest.approx(0.9, abs=0.04)
    # Half of these rows are unsafe by a noisy label, so a floor that high hides many of them: the report says so.
    assert report.unsafe_at_zero == pytest.approx(
        np.mean([calibration(r) == 0 for r, u in zip(risk, unsafe, strict=True) if u]), abs=0.05
    )
    # Chosen on rows of little risk alone, it lies lower.
    tame = [not u and r < 0.1 for r, u in zip(risk, unsafe, strict=True)]
    assert fit(risk, unsafe, prompts, benign_quantile=0.9, benign=tame)[0].benign_floor < calibration.benign_floor


def test_rows_of_a_prompt_stay_on_one_side():
    # Every prompt's rows carry the prompt's own risk. Were rows split alone, some risk would stand on both sides.
    generator = np.random.default_rng(0)
    unsafe = [bool(p % 2) for p in range(60) for _ in range(5)]
    risk = [float(r) for r in np.repeat(generator.random(60), 5)]
    risk = [0.5 + r / 2 if u else r / 2 for r, u in zip(risk, unsafe, strict=True)]
    prompts = [p for p in range(60) for _ in range(5)]
    _, report = fit(risk, unsafe, prompts, method="isotonic", benign_quantile=None)
    assert report.held_out_rows == 30 * 5
    assert report.fitted_rows == 30 * 5


def test_unscored_rows_take_no_part_and_are_counted():
    risk, unsafe, prompts = rows()
    with_holes = [None, *risk, None], [True, *unsafe, False], ["x", *prompts, "y"]
    calibration, report = fit(*with_holes)
    assert (calibration, report.unscored) == (fit(risk, unsafe, prompts)[0], 2)
    assert calibration(None) is None


def test_ece_brier_and_auroc_are_what_they_are_called():
    risk, unsafe = np.array([0.1, 0.1, 0.9, 0.9]), np.array([False, True, True, True])
    figures = measure(risk, unsafe, np.arange(4))
    # bins: .1 has share .5 (gap .4), .9 has share 1 (gap .1), half of the rows each
    assert figures.ece.value == pytest.approx(0.25)
    # (.01 + .81 + .01 + .01) / 4
    assert figures.brier.value == pytest.approx(0.21)
    # the safe row ties with one of three unsafe rows and lies below two: (.5 + 1 + 1) / 3
    assert figures.auroc.value == pytest.approx(2.5 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unsafe": [True]}, "lists of one length"),
        ({"risk": [1.5] * 400}, r"risk of row 0 is 1.5"),
        ({"risk": [math.nan] * 400}, "risk of row 0 is nan"),
        ({"unsafe": [False] * 400}, "unsafe rows of 0 prompts and needs 8"),
        ({"prompts": ["one"] * 400}, "rows of [01] prompts"),
        ({"benign_quantile": 1.0}, "benign_quantile is 1.0"),
        ({"held_out": 0.0}, "held_out is 0.0"),
        ({"benign": [False] * 400}, "needs benign rows"),
        ({"risk": [0.3] * 400, "method": "isotonic"}, "same risk 0.3 to all"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(change, message):
    risk, unsafe, prompts = rows()
    with pytest.raises(DataError, match=message):
        fit(**{"risk": risk, "unsafe": unsafe, "prompts": prompts, **change})


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_a_guard_that_ranks_the_wrong_way_round_is_refused(method):
    risk, unsafe, prompts = rows()
    with pytest.raises(DataError, match="does not rise with the label"):
        fit([1 - r for r in risk], unsafe, prompts, method=method)


def test_a_calibration_survives_its_file(tmp_path):
    for method in ("temperature", "isotonic"):
        calibration, _ = fit(*rows(), method=method)
        calibration.save(tmp_path / "c.json")
        assert Calibration.load(tmp_path / "c.json") == calibration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "is not one"),
        ('{"guard": "g"}', "fingerprint: Field required"),
        (json.dumps({**BOUND, "method": "temperature"}), "needs `temperature`"),
        (json.dumps({**BOUND, "method": "temperature", "temperature": -1}), "greater than 0"),
        (json.dumps({**BOUND, "method": "isotonic", "knots": [[0, 0.5], [1, 0.2]]}), "never falling"),
        (json.dumps({**BOUND, "method": "isotonic", "knots": [[0, 0.5], [1, 2]]}), r"\[0, 1\]"),
    ],
)
def test_a_file_that_holds_no_calibration_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Calibration.load(tmp_path / "c.json")
    with pytest.raises(DataError, match="no such file"):
        Calibration.load(tmp_path / "missing.json")


def test_a_calibrated_guard_maps_every_cut_and_unscored_stays_unscored():
    script = {"": 0.1, "one": 0.8, "one two": None, "one two three": 1.0}
    calibration = Calibration(guard="scripted", fingerprint="f", method="temperature", temperature=2.0)
    (trace,) = CalibratedGuard(ScriptedGuardrail(script), calibration, "f").assess([HELLO], [(0, 3, 7, 13)])
    # logit(.1) = -ln 9 -> sigmoid(-ln 3) = 1/4
    assert trace.risk == (pytest.approx(0.25), pytest.approx(2 / 3), None, 1.0)
    assert trace.reason == "the script has no risk for this prefix"


def test_the_contract_holds_for_a_calibrated_guard():
    calibration = Calibration(guard="scripted", fingerprint="f", method="temperature", temperature=2.0)
    guard = ScriptedGuardrail(lambda exchange, prefix: len(prefix) % 97 / 100)
    assert check_guardrail(CalibratedGuard(guard, calibration, "f"), tolerance=0.0).name == "calibrated:scripted"


def test_a_session_is_calibrated_as_well():
    calibration = Calibration(guard="scripted", fingerprint="f", method="temperature", temperature=2.0)
    guard = CalibratedStreamingGuard(ScriptedGuardrail({"one": 0.8}), calibration, "f")
    session = guard.open(HELLO.messages)
    assert session.push("one") == pytest.approx(2 / 3)
    assert session.push(" two") is None


def test_a_calibration_is_refused_for_another_guard(tmp_path):
    path, rules = tmp_path / "c.json", RulesOptions()
    fitted = Calibration(
        guard="rules", fingerprint=guard_fingerprint(rules), method="temperature", temperature=2.0, benign_floor=0.3
    )
    fitted.save(path)
    guard = load_guardrail({"type": "calibrated", "guard": "rules", "calibration": str(path)})
    # sigmoid(logit(.02) / 2) = .125 lies below the floor
    assert guard.assess([HELLO], [(0,)])[0].risk == (0.0,)
    assert not isinstance(guard, StreamingGuardrail)
    with pytest.raises(ConfigError, match=r"fitted for guard 'rules' and this is 'ngram'"):
        load_guardrail({"type": "calibrated", "guard": "ngram", "calibration": str(path)})
    with pytest.raises(ConfigError, match="fit it again"):
        load_guardrail({"type": "calibrated", "guard": {"type": "rules", "base_risk": 0.1}, "calibration": str(path)})


def test_a_guard_is_judged_calibrated_and_carries_what_was_fitted(tmp_path):
    # The pattern is found in 60 responses, half of which are unsafe, and in none of the 60 others.
    options = RulesOptions(patterns=(RulePattern(pattern="alarm", risk=0.95),), base_risk=0.02)
    exchanges = [
        Exchange(({"role": "user", "content": f"q{i}"},), "an alarm" if i % 2 else "all is calm") for i in range(120)
    ]
    unsafe = [i % 4 == 1 for i in range(120)]
    counts = []
    calibration, report = calibrate_guard(
        options, exchanges, unsafe, method="isotonic", benign_quantile=None, on_scored=counts.append
    )
    assert counts == [64, 120]
    assert report.fitted_rows + report.held_out_rows == 120
    calibration.save(tmp_path / "c.json")
    guard = load_guardrail({"type": "calibrated", "guard": options, "calibration": str(tmp_path / "c.json")})
    calm, alarm = (trace.risk[0] for trace in guard.assess(exchanges[:2], [(11,), (8,)]))
    assert calm == 0.0
    assert alarm == pytest.approx(0.5, abs=0.15)
    with pytest.raises(ConfigError, match="carries a calibration already"):
        calibrate_guard(CalibratedOptions(guard=options, calibration="c.json"), exchanges, unsafe)


def test_a_fingerprint_follows_what_decides_and_not_how_it_runs(tmp_path):
    model = tmp_path / "a"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    plain = PromptedOptions(model=str(model))
    assert guard_fingerprint(plain) == guard_fingerprint(
        PromptedOptions(model=str(model), batch_size=3, dtype="float32")
    )
    assert guard_fingerprint(plain) != guard_fingerprint(PromptedOptions(model=str(model), verdict_prefix="\n"))
    moved = model.rename(tmp_path / "b")
    assert guard_fingerprint(PromptedOptions(model=str(moved))) == guard_fingerprint(
        PromptedOptions(model=str(moved), self_check="off")
    )
    before = guard_fingerprint(PromptedOptions(model=str(moved)))
    (moved / "model.safetensors").write_bytes(b"weightz")
    assert guard_fingerprint(PromptedOptions(model=str(moved))) != before
    rule = RulesOptions(patterns=(RulePattern(pattern="x"),))
    both = [EnsembleOptions(members=("ngram", r)) for r in (rule, RulesOptions())]
    assert guard_fingerprint(both[0]) != guard_fingerprint(both[1])
    assert guard_fingerprint(PluginOptions(name="x")) != guard_fingerprint(PluginOptions(name="x", options={"a": 1}))


def test_options_nest_and_survive_json(tmp_path):
    inner = {"type": "rules", "base_risk": 0.1}
    options = guard_options({"type": "calibrated", "calibration": "c.json", "guard": inner})
    assert isinstance(options, CalibratedOptions)
    assert options.guard == RulesOptions(base_risk=0.1)
    assert guard_options(options.model_dump(mode="json")) == options
    with pytest.raises(ConfigError, match=r"guard: .*rules': base_risk"):
        guard_options({"type": "calibrated", "calibration": "c.json", "guard": {"type": "rules", "base_risk": 7}})
    with pytest.raises(ConfigError, match="did you mean 'rules'"):
        guard_options({"type": "calibrated", "calibration": "c.json", "guard": "rulez"})
    with pytest.raises(ConfigError, match="by a name or by options; got 3"):
        guard_options({"type": "calibrated", "calibration": "c.json", "guard": 3})
