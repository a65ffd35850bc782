"""`from ballast import ...`: every public name is there, and none costs anything before it is used."""

import subprocess
import sys

import pytest

import ballast


def test_importing_ballast_imports_nothing_else_of_weight():
    code = "import sys; before = set(sys.modules); import ballast; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    added = done.stdout
    for heavy in ("torch", "transformers", "trl", "vllm", "pydantic", "numpy", "yaml", "ballast.guardrails"):
        assert f"'{heavy}'" not in added


@pytest.mark.parametrize("name", ballast.__all__)
def test_every_public_name_is_the_object_of_its_module(name):
    value = getattr(ballast, name)
    assert value.__name__ == name
    assert value.__module__ == ballast._HOMES[name]


def test_the_public_names_are_listed_once_and_shown():
    assert sorted(ballast._HOMES) == sorted(ballast.__all__)
    assert set(ballast.__all__) <= set(dir(ballast))


def test_a_name_that_is_not_there_names_those_that_are():
    with pytest.raises(AttributeError, match="RunConfig"):
        _ = ballast.RunConfiguration
