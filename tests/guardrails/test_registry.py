"""Names and options to guards; what other packages bring comes in by entry point."""

import sys
import types
from importlib.metadata import EntryPoint

import pytest

from ballast.errors import ConfigError, GuardError
from ballast.guardrails import registry
from ballast.guardrails.registry import BUILT_INS, OPTIONS, PluginOptions, describe_guards, load_guardrail
from ballast.guardrails.rules import RulesGuard, RulesOptions
from ballast.guardrails.scripted import ScriptedGuardrail


@pytest.fixture
def plugins(monkeypatch):
    """Installs entry points for the test: a call with name=object."""
    module = types.ModuleType("somebodys_guards")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    points = []

    def install(**named):
        for name, value in named.items():
            setattr(module, name, value)
            points.append(EntryPoint(name, f"{module.__name__}:{name}", registry.ENTRY_POINT_GROUP))
        return points

    monkeypatch.setattr(
        registry.importlib.metadata, "entry_points", lambda group: [p for p in points if p.group == group]
    )
    return install


def test_a_name_a_mapping_and_options_give_the_same_guard():
    for what in ("rules", {"type": "rules"}, RulesOptions()):
        guard = load_guardrail(what, base_risk=0.2)
        assert isinstance(guard, RulesGuard)
        assert guard.options == RulesOptions(base_risk=0.2)


def test_every_built_in_has_options_of_its_own_type():
    assert set(OPTIONS) == {*BUILT_INS, "plugin"}
    for name, target in OPTIONS.items():
        assert registry._imported(target).model_fields["type"].default == name


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'rules'"):
        load_guardrail("rulez")
    with pytest.raises(ConfigError, match="no such guard"):
        load_guardrail({"type": "qqqqqq"})


def test_options_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match=r"guardrail 'rules': base_risk: .*less than or equal to 1"):
        load_guardrail("rules", base_risk=3)
    with pytest.raises(ConfigError, match=r"colour: .*not permitted"):
        load_guardrail("rules", colour="red")
    with pytest.raises(ConfigError, match="key 'type'"):
        load_guardrail({"base_risk": 0.1})


def test_a_plug_in_is_called_with_its_options(plugins):
    plugins(steady=lambda risk=0.5: ScriptedGuardrail(lambda exchange, prefix: risk, name="steady"))
    for guard in (
        load_guardrail("steady", risk=0.25),
        load_guardrail(PluginOptions(name="steady", options={"risk": 0.25})),
    ):
        assert guard.name == "steady"
        assert guard.script(None, "") == 0.25
    assert ("steady", "", "somebodys_guards:steady") in [(e.name, e.package, e.what) for e in describe_guards()]


def test_a_plug_in_that_cannot_be_used_is_named_with_its_target(plugins):
    plugins(number=lambda: 3, steady=lambda: ScriptedGuardrail({}))
    with pytest.raises(GuardError, match=r"somebodys_guards:number made a int"):
        load_guardrail("number")
    with pytest.raises(ConfigError, match="does not take these options"):
        load_guardrail("steady", risk=0.1)
    points = plugins()
    points.append(EntryPoint("gone", "somebodys_guards:gone", registry.ENTRY_POINT_GROUP))
    with pytest.raises(GuardError, match="could not be loaded"):
        load_guardrail("gone")
    points.append(points[-1])
    with pytest.raises(ConfigError, match="2 packages"):
        load_guardrail("gone")


def test_an_unknown_plug_in_is_answered_with_the_nearest(plugins):
    plugins(steady=lambda: ScriptedGuardrail({}))
    with pytest.raises(ConfigError, match="did you mean 'steady'"):
        load_guardrail(PluginOptions(name="stedy"))


def test_every_guard_is_listed_with_a_sentence():
    entries = describe_guards()
    assert {entry.name for entry in entries} >= set(BUILT_INS)
    assert all(entry.what and entry.licence.name for entry in entries)
