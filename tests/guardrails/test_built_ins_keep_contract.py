"""Every built-in guard has a test that sends it through the contract; a new one without such a test fails here."""

import ast
from pathlib import Path

import pytest

from ballast.guardrails.calibrated import guard_fingerprint
from ballast.guardrails.calibration import Calibration
from ballast.guardrails.contract import check_guardrail
from ballast.guardrails.registry import BUILT_INS, guard_options, load_guardrail

HERE = Path(__file__).parent

# type -> the test that calls check_guardrail with it; those on models use tiny ones, but for the embedded guard
CONTRACT_TESTS = {
    "calibrated": "test_built_ins_keep_contract.py:test_a_calibrated_built_in_keeps_the_contract",
    "classifier": "test_classifier.py:test_the_contract_holds",
    "embedded": "test_embedded_guard.py:test_the_guard_keeps_the_contract",
    "ensemble": "test_ensemble.py:test_the_contract_holds",
    "granite_guardian": "test_families.py:test_a_family_keeps_the_contract",
    "llama_guard": "test_families.py:test_a_family_keeps_the_contract",
    "moderation": "test_moderation.py:test_it_keeps_the_contract",
    "ngram": "test_ngram_guard.py:test_the_guard_keeps_the_contract",
    "prompted": "test_prompted.py:test_the_contract_holds",
    "qwen3guard": "test_families.py:test_a_family_keeps_the_contract",
    "qwen3guard_stream": "test_qwen3guard_stream.py:test_the_contract_holds",
    "rules": "test_contract.py:test_the_fakes_and_the_rules_keep_the_contract",
    "shieldgemma": "test_families.py:test_a_family_keeps_the_contract",
}


@pytest.mark.parametrize("kind", BUILT_INS)
def test_a_built_in_is_sent_through_the_contract(kind):
    file, _, name = CONTRACT_TESTS[kind].partition(":")
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    (test,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    called = {node.func.id for node in ast.walk(test) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "check_guardrail" in called


def test_a_calibrated_built_in_keeps_the_contract(tmp_path):
    path = tmp_path / "calibration.json"
    fitted = {"guard": "rules", "fingerprint": guard_fingerprint(guard_options("rules"))}
    Calibration(**fitted, method="temperature", temperature=1.5, benign_floor=0.05).save(path)
    report = check_guardrail(load_guardrail("calibrated", guard="rules", calibration=str(path)), tolerance=0.0)
    assert (report.name, report.unscored) == ("calibrated:rules", {})
