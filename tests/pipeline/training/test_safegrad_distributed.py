"""SafeGrad on two gloo processes, under DDP and FSDP2, is the formula on all rows together."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.training import safegrad_reference as reference
from tests.pipeline.training.safegrad_two_processes import LIMIT, RHO, SAFE, TASK

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, embedded_folder: Path) -> Path:
    """What both processes wrote down."""
    found = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "tests.pipeline.training.safegrad_two_processes", str(found)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return found


def wanted(weights: dict[str, torch.Tensor], start: Any) -> tuple[torch.Tensor, bool]:
    exact = reference.in_float64(reference.small_model(), weights)
    u = reference.task_gradient(exact, list(TASK))
    a, _ = reference.kl_gradient(exact, start, list(SAFE))
    return reference.combined(u, a, RHO, LIMIT), bool(u @ a < 0)


def as_vector(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.double().reshape(-1) for tensor in tensors.values()])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_under_ddp_each_process_gives_its_optimizer_the_formula_over_all_rows(folder: Path, accumulation: int) -> None:
    first, second = (torch.load(folder / f"ddp{accumulation}-{rank}.pt", weights_only=True) for rank in (0, 1))
    start, conflicts = reference.small_model().double(), 0
    for step, weights in enumerate(first["weights"]):
        gradient, conflict = wanted(weights, start)
        conflicts += conflict
        assert (as_vector(first["gradients"][step]) - gradient).abs().max() < 1e-6
        for name, value in first["gradients"][step].items():
            assert torch.equal(value, second["gradients"][step][name]), name  # or the processes part silently
    assert conflicts >= 1


def test_under_fsdp2_the_sharded_gradient_is_the_formula_over_all_rows(folder: Path) -> None:
    steps = torch.load(folder / "fsdp2-0.pt", weights_only=True)
    start, conflicts = reference.small_model().double(), 0
    for step in steps:
        gradient, conflict = wanted(step["weights"], start)
        conflicts += conflict
        assert (as_vector(step["gradients"]) - gradient).abs().max() < 1e-6
    assert conflicts >= 1


def test_under_fsdp2_the_watchdog_shortens_alike_on_both_processes(folder: Path) -> None:
    first, second = (torch.load(folder / f"fsdp2-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert any(step["share"] < 1 for step in first)
    for one, other in zip(first, second, strict=True):
        assert one["share"] == other["share"]
        moved = as_vector(one["weights"]) + one["share"] * (as_vector(one["proposed"]) - as_vector(one["weights"]))
        assert (as_vector(one["after"]) - moved).abs().max() < 1e-6
