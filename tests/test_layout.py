"""The layout of the repository, and that the tools which guard it would notice a breach."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sysconfig.get_path("scripts"))
LINKS = ("guardrails", "rewards", "pipeline", "configs")


@pytest.mark.parametrize("name", LINKS)
def test_a_link_at_the_root_leads_to_its_folder(name):
    link = ROOT / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()  # it must hold in every checkout
    assert link.resolve() == (ROOT / "src" / "ballast" / name).resolve()


def banned_imports(source: str, folder: Path) -> list[str]:
    file = folder / "script.py"
    file.write_text(source)
    command = [
        BIN / "ruff",
        "check",
        "--config",
        ROOT / "pyproject.toml",
        "--select",
        "TID251",
        "--output-format",
        "concise",
        file,
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if "TID251" in line]


@pytest.mark.parametrize("name", ["guardrails", "rewards", "pipeline"])
@pytest.mark.parametrize(
    "form", ["import {}", "import {}.types", "from {} import types", "from {}.types import Exchange"]
)
def test_a_bare_import_of_a_folder_is_refused_in_every_form(name, form, tmp_path):
    assert len(banned_imports(form.format(name) + "\n", tmp_path)) == 1


def test_the_full_name_is_not_refused(tmp_path):
    assert banned_imports("import ballast.rewards\nfrom ballast.guardrails.types import Exchange\n", tmp_path) == []


def contracts(src: Path) -> subprocess.CompletedProcess[str]:
    """import-linter's answer about the package in `src`."""
    code = "import sys; sys.path.insert(0, sys.argv.pop()); from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--config", str(ROOT / "pyproject.toml"), "--no-cache", str(src)]
    return subprocess.run(command, cwd=src, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    """The package's Python files, away from the repository."""
    shutil.copytree(
        ROOT / "src",
        tmp_path / "src",
        ignore=lambda folder, names: [n for n in names if Path(folder, n).is_file() and not n.endswith(".py")],
    )
    return tmp_path / "src"


def test_the_direction_of_imports_holds(copy):
    answer = contracts(copy)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("guardrails/segments.py", "import ballast.rewards", "Direction"),
        ("rewards/refusal.py", "import ballast.pipeline.config", "Direction"),
        ("guardrails/segments.py", "import vllm", "neither trainer nor engine"),
        ("rewards/refusal.py", "import trl", "neither trainer nor engine"),
    ],
)
def test_an_import_against_the_direction_is_caught(copy, file, line, contract):
    with (copy / "ballast" / file).open("a") as handle:
        handle.write(f"\n{line}\n")
    answer = contracts(copy)
    assert answer.returncode == 1
    broken = answer.stdout.split("Broken contracts")[-1]
    assert contract in broken
