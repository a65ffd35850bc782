"""The wheel alone is enough: built from the sdist, installed away from the repository, imported whole."""

import json
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ballast"

# Imports every module of the installed tree and says where it came from and what failed.
IMPORT_ALL = """
import importlib, json, pkgutil, ballast
failed, origins = {}, {}
for module in pkgutil.walk_packages(ballast.__path__, "ballast.", onerror=lambda name: failed.setdefault(name, "package")):
    try:
        origins[module.name] = importlib.import_module(module.name).__file__
    except BaseException as error:
        failed[module.name] = f"{type(error).__name__}: {error}"
print(json.dumps({"failed": failed, "origins": origins}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> Path:
    """The python of an environment that has the wheel, and sees this environment's packages behind it."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    run(uv, "pip", "install", "--offline", "--no-deps", "--python", python, archives[1], cwd=home)
    # A folder on the path, not a site folder: the .pth of the editable install in it is not followed.
    (site(python) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def site(python: Path) -> Path:
    return next((python.parents[1] / "lib").glob("python*/site-packages"))


def test_the_sdist_holds_every_file_once_and_no_link(archives):
    with tarfile.open(archives[0]) as archive:
        members = archive.getmembers()
    names = [member.name.split("/", 1)[-1] for member in members]
    assert not [m.name for m in members if m.issym() or m.islnk()]
    assert len(names) == len(set(names))
    assert not {name.split("/")[0] for name in names} & {"guardrails", "rewards", "pipeline", "configs"}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile"} <= set(names)


def test_nothing_but_ballast_is_installed(installed):
    top = {
        path.name for path in site(installed).iterdir() if not path.name.endswith((".dist-info", ".pth", ".virtualenv"))
    }
    assert top - {"_virtualenv.py", "__pycache__"} == {"ballast"}


def test_every_file_of_the_package_is_in_the_wheel(installed):
    wanted = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    there = site(installed) / "ballast"
    assert {p.relative_to(there) for p in there.rglob("*") if p.is_file() and "__pycache__" not in p.parts} == wanted
    assert Path("configs/demo.yaml") in wanted
    assert any(path.suffix == ".jsonl" for path in wanted)
    assert any(path.suffix == ".safetensors" for path in wanted)


def test_every_module_imports_away_from_the_repository(installed, tmp_path):
    answer = json.loads(run(installed, "-c", IMPORT_ALL, cwd=tmp_path).splitlines()[-1])
    assert answer["failed"] == {}
    there = site(installed) / "ballast"
    assert {Path(origin) for origin in answer["origins"].values()} == set(there.rglob("*.py")) - {there / "__init__.py"}


def test_the_shipped_demo_is_found_away_from_the_repository(installed, tmp_path):
    printed = run(installed.parent / "ballast", "demo", "--dry-run", cwd=tmp_path)
    assert "name: demo" in printed
