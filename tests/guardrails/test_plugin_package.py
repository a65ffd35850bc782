"""The example package is installed as anybody's would be, found, held to the contract, and used."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from ballast.errors import ConfigError
from ballast.guardrails.contract import check_guardrail
from ballast.guardrails.registry import PluginOptions, describe_guards, licence_of, load_guardrail
from ballast.guardrails.types import Exchange

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "guard_plugin"
PAGE = ROOT / "docs" / "write-a-guard.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the example built and installed into it, without a network."""
    target = tmp_path_factory.mktemp("plugin")
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    command = [uv, "pip", "install", "--offline", "--no-deps", "--no-build-isolation", "--python", sys.executable]
    done = subprocess.run([*command, "--target", target, EXAMPLE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def plugin(installed, monkeypatch):
    """The installed package on the path of this process, and gone from it afterwards."""
    monkeypatch.syspath_prepend(installed)
    yield
    sys.modules.pop("watchlist_guard", None)


def ballast(installed: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ballast.pipeline.cli", *map(str, words)]
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


def test_the_installed_guard_is_listed_with_its_package_and_licence(plugin):
    (entry,) = [entry for entry in describe_guards() if entry.name == "watchlist"]
    assert (entry.package, entry.what) == ("watchlist-guard", "watchlist_guard:WatchlistGuard")
    # A package's licence says nothing of weights: it does not become a yes.
    assert (entry.licence.name, entry.licence.as_reward) == ("Apache-2.0", "unknown")
    assert licence_of(PluginOptions(name="watchlist")) == entry.licence


def test_the_installed_guard_is_loaded_with_its_options_and_judges(plugin):
    guard = load_guardrail("watchlist", words={"rust": 0.5, "apple": 0.2})
    (trace,) = guard.assess([Exchange((), "an apple and rust")], [(0, 8, 17)])
    # 1 - .8 = .2; 1 - .8 * .5 = .6
    assert trace.risk == pytest.approx((0.0, 0.2, 0.6))
    with pytest.raises(ConfigError, match="weights lie in"):
        load_guardrail("watchlist", words={"rust": 7})


def test_the_installed_guard_keeps_the_contract(plugin):
    report = check_guardrail(load_guardrail("watchlist"), tolerance=0.0)
    assert list(report.unscored) == ["a response of 20000 characters"]
    assert report.notes == ()


def test_the_commands_use_the_installed_guard(installed, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Hello", "response": "an apple"}) + "\n")
    assert "watchlist-guard" in ballast(installed, "guard", "list").stdout
    checked = ballast(installed, "guard", "check", "watchlist", "--set", "longest=30000")
    assert checked.returncode == 0, checked.stderr
    assert "a response of 20000 characters: scored" in checked.stdout
    scored = ballast(installed, "guard", "score", rows, "--guard", "watchlist", "--set", "words.apple=0.25")
    assert json.loads(scored.stdout)["risk"] == [0.25]


def test_the_page_shows_the_example_as_it_is_in_40_lines_at_most():
    page = PAGE.read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert code[0] == (EXAMPLE / "watchlist_guard.py").read_text()
    assert code[0].count("\n") <= 40
    (declared,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    package = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    assert tomllib.loads(declared)["project"].items() <= package["project"].items()
