"""`ballast restore`: what it hands on, what it shows, and how little it imports to be asked for help."""

import subprocess
import sys

import numpy as np
import pytest
from tests.pipeline.restoration.checkpoints import MATRICES, Three, close, load, lora, low_rank
from typer.testing import CliRunner

from ballast.pipeline import cli


@pytest.fixture
def three(tmp_path):
    return Three(tmp_path)


def invoke(three, method, *options, tuned=True):
    words = ["restore", method, "--base", three.base, "--aligned", three.aligned, "--out", str(three.folder / "out")]
    return CliRunner().invoke(cli.app, [*words, *(("--tuned", three.tuned) if tuned else ()), *options])


def test_lox_from_the_command_line(three):
    result = invoke(three, "lox", "--rank", "2", "--alpha", "0.5", "--modules", "*.mlp.*", "--modules", "*q_proj*")
    assert result.exit_code == 0, result.output
    found = load(three.folder / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    term = low_rank(three.aligned_arrays[name] - three.base_arrays[name], 2)
    assert close(found[name], three.tuned_arrays[name] + 0.5 * term)
    assert np.array_equal(found["model.layers.1.self_attn.k_proj.weight"],
                          three.tuned_arrays["model.layers.1.self_attn.k_proj.weight"])  # fmt: skip
    # 3 matrices in each of 2 layers; the other 7 of 13 tensors stay.
    assert "6 tensors changed, 7 left as they were" in result.stdout
    assert f"written: {three.folder / 'out'}" in result.stdout
    assert "mlp.up_proj.weight" in result.stdout
    assert "mean energy" in result.stdout


def test_without_a_tuned_model_lox_hardens_the_aligned_one(three):
    assert invoke(three, "lox", "--alpha", "0", tuned=False).exit_code == 0
    found = load(three.folder / "out")
    assert all(found[name].tobytes() == three.aligned_arrays[name].tobytes() for name in found)


@pytest.mark.parametrize(("method", "option"), [("safe-lora", "--tau=-1"), ("resta", "--gamma=0")])
def test_the_other_methods_from_the_command_line(three, method, option):
    result = invoke(three, method, option)
    assert result.exit_code == 0, result.output
    assert "0 tensors changed, 13 left as they were" in result.stdout
    assert "note: no tensor was changed" in result.stdout


def test_an_adapter_that_was_moved_is_placed_by_an_option(three):
    three.tuned, deltas = lora(three.folder / "lora", "elsewhere", seed=1)
    refused = invoke(three, "resta")
    assert refused.exit_code == 2
    assert "--tuned-over aligned" in refused.stderr
    assert invoke(three, "resta", "--gamma=0", "--tuned-over", "aligned").exit_code == 0
    found = load(three.folder / "out")
    assert close(found[MATRICES[0]], three.aligned_arrays[MATRICES[0]] + deltas[MATRICES[0]])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "cuda:99"), "device 'cuda:99' cannot be used"),
        (("--device", "toaster"), "device 'toaster' cannot be used"),
        (("--alpha", "inf"), "alpha inf"),
        (("--modules", "nothing"), "looks at no tensor"),
    ],
)
def test_what_cannot_be_used_is_said_and_nothing_is_written(three, options, said):
    result = invoke(three, "lox", *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (three.folder / "out").exists()


def test_asking_for_help_imports_nothing_heavy():
    code = (
        "import sys; from ballast.pipeline import cli\n"
        "try: cli.app(['restore', 'lox', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'safetensors', 'numpy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
