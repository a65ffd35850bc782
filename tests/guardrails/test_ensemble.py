"""Several guards as one: mean or highest, and never a quiet average of those that answered."""

import pytest

from ballast.errors import ConfigError, GuardError
from ballast.guardrails.contract import check_guardrail
from ballast.guardrails.families.ensemble import EnsembleGuard, EnsembleOptions
from ballast.guardrails.registry import OPTIONS, guard_options, load_guardrail
from ballast.guardrails.rules import RulesOptions
from ballast.guardrails.scripted import ScriptedGuardrail
from ballast.guardrails.types import Exchange, RiskTrace
from ballast.pipeline.config import RunConfig

HELLO = Exchange(({"role": "user", "content": "Hello"},), "a b")
CUTS = [(0, 1, 3)]


def scripted(name, *risks):
    return ScriptedGuardrail(dict(zip(("", "a", "a b"), risks, strict=True)), name=name)


def ensemble(*members, **options):
    return EnsembleGuard(EnsembleOptions(members=("rules", "ngram"), **options), members)


class Fixed:
    """A guard that returns given traces."""

    def __init__(self, name, *traces):
        self.name, self.traces = name, list(traces)

    def assess(self, exchanges, cuts):
        return self.traces


@pytest.mark.parametrize("concurrent", [True, False])
def test_mean_and_max_combine_cut_by_cut(concurrent):
    members = scripted("x", 0.0, 0.5, 1.0), scripted("y", 0.5, 0.25, 0.5)
    for combine, risks in (("mean", (0.25, 0.375, 0.75)), ("max", (0.5, 0.5, 1.0))):
        guard = ensemble(*members, combine=combine, concurrent=concurrent)
        assert guard.assess([HELLO], CUTS)[0].risk == risks
        assert guard.name == f"{combine}(x, y)"


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_a_cut_that_one_member_left_unscored_is_unscored_and_names_it(combine):
    guard = ensemble(scripted("x", 0.25, None, 1.0), scripted("y", 0.75, 0.9, 0.5), combine=combine)
    (trace,) = guard.assess([HELLO], CUTS)
    assert [risk is None for risk in trace.risk] == [False, True, False]
    assert trace.reason == "member 'x': the script has no risk for this prefix"


def test_the_others_decide_only_where_that_is_asked_for():
    members = scripted("x", 0.25, None, None), scripted("y", 0.75, 0.9, None)
    (trace,) = ensemble(*members, on_unscored="others").assess([HELLO], CUTS)
    assert trace.risk == (0.5, 0.9, None)  # nobody scored the last: still unscored
    assert "member 'x'" in trace.reason
    assert "member 'y'" in trace.reason


def test_label_mass_is_the_lowest_and_the_category_that_of_the_riskiest_member():
    x = RiskTrace((0, 1, 3), (0.1, 0.8, 0.2), label_mass=0.99, category=("p", "q", "r"))
    y = RiskTrace((0, 1, 3), (0.2, 0.3, 0.9), label_mass=0.6)
    (trace,) = ensemble(Fixed("x", x), Fixed("y", y)).assess([HELLO], CUTS)
    assert trace.label_mass == 0.6
    assert trace.category == (None, "q", None)  # y, which has no categories, is riskier at the first and the last


def test_a_member_that_answers_something_else_is_named():
    good, bad = scripted("x", 0.1, 0.2, 0.3), Fixed("broken", RiskTrace((0, 3), (0.1, 0.2)))
    with pytest.raises(GuardError, match="member 'broken'"):
        ensemble(good, bad).assess([HELLO], CUTS)
    with pytest.raises(GuardError, match="member 'broken'"):
        ensemble(good, Fixed("broken")).assess([HELLO], CUTS)


def test_the_contract_holds():
    members = [ScriptedGuardrail(lambda e, p, m=m: len(p) % m / 100, name=str(m)) for m in (97, 89)]
    assert check_guardrail(ensemble(*members), tolerance=0.0).unscored == {}
    report = check_guardrail(load_guardrail("ensemble", members=["rules", "ngram"], combine="max"))
    assert report.name == "max(rules, ngram)"


def test_members_are_read_as_the_registry_reads_them_and_may_nest():
    options = guard_options(
        {
            "type": "ensemble",
            "members": [
                "ngram",
                {"type": "ensemble", "members": ["embedded", {"type": "rules", "base_risk": 0.1}], "combine": "max"},
            ],
        }
    )
    assert options.members[1].members[1] == RulesOptions(base_risk=0.1)
    assert guard_options(options.model_dump(mode="json")) == options
    for members, message in (
        (["rules"], "members holds 1 guards; give two"),
        (["rules", "rules"], "members 0 and 1 are the same guard"),
        (["rules", "rulez"], "did you mean 'rules'"),
        (["rules", {"type": "rules", "colour": "red"}], "colour"),
        (["rules", {"base_risk": 0.1}], "key 'type'"),
    ):
        with pytest.raises(ConfigError, match=message):
            guard_options({"type": "ensemble", "members": members})


def test_every_built_in_type_may_be_a_member():
    minimal = {
        "calibrated": {"guard": "rules", "calibration": "c.json"},
        "ensemble": {"members": ["rules", "ngram"]},
        "plugin": {"name": "somebodys"},
        "classifier": {"model": "a/b", "unsafe_labels": [1]},
    }
    for kind in OPTIONS:
        needed = minimal.get(kind, {"model": "a/b"} if "model" in _required(kind) else {})
        other = "ngram" if kind == "rules" else "rules"
        if set(_required(kind)) <= set(needed):
            options = guard_options({"type": "ensemble", "members": [{"type": kind, **needed}, other]})
            assert options.members[0].type == kind


def _required(kind):
    from ballast.guardrails.registry import _imported

    return [name for name, field in _imported(OPTIONS[kind]).model_fields.items() if field.is_required()]


def test_an_ensemble_that_contains_the_reward_guard_must_not_judge_it():
    def config(guard, judge):
        return RunConfig.model_validate({"name": "x", "model": {"name": "a/b"}, "guard": guard, "judge": judge})

    both = {"type": "ensemble", "members": ["embedded", "ngram"]}
    calibrated = {"type": "calibrated", "guard": both, "calibration": "c.json"}
    for guard, judge in (
        ({"type": "embedded"}, both),
        (both, {"type": "ngram"}),
        ({"type": "embedded"}, calibrated),
        (
            {"type": "calibrated", "guard": "ngram", "calibration": "c.json"},
            {"type": "ensemble", "members": ["ngram", "rules"]},
        ),
    ):
        with pytest.raises(ValueError, match="share one that decides"):
            config(guard, judge)
    with pytest.raises(ValueError, match="judge and guard are the same"):
        config({"type": "calibrated", "guard": "ngram", "calibration": "c.json"}, {"type": "ngram"})
    assert config(both, {"type": "rules"}).guard.members[0].type == "embedded"
