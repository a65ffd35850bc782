"""The safety basin: directions, VISAGE, edges, the picture, and a model that is as before."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ballast.errors import ConfigError
from ballast.pipeline import cli
from ballast.pipeline.restoration.basin import Basin, Reading, direction_like, put_back, safety_basin
from ballast.pipeline.restoration.basin_figure import basin_figure


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 6)).to(dtype)
    with torch.no_grad():
        net[0].weight[0, 0] = -0.0  # a sum with 0 would turn it into +0.0
    return net


def state(net: torch.nn.Module) -> dict[str, bytes]:
    return {name: p.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, p in net.named_parameters()}


def shares(*complied: float | None) -> Basin:
    count = len(complied)
    distances = tuple(0.5 * (2 * i / (count - 1) - 1) for i in range(count))
    return Basin(distances, (tuple(Reading(share, share, 1.0) for share in complied),))


def test_each_tensor_moves_by_its_own_norm_times_the_distance() -> None:
    net = network()
    before = {name: p.detach().double().numpy().copy() for name, p in net.named_parameters()}
    steps: list[dict[str, np.ndarray]] = []

    def measure(model: torch.nn.Module) -> Reading:
        steps.append({name: p.detach().double().numpy() - before[name] for name, p in model.named_parameters()})
        return Reading(0.0, 0.0, 1.0)

    basin = safety_basin(net, measure, reach=0.5, points=5)
    assert basin.distances == (-0.5, -0.25, 0.0, 0.25, 0.5)
    # The middle is measured first; then -0.5, -0.25, 0.25 and 0.5.
    for t, moved in zip((0.0, -0.5, -0.25, 0.25, 0.5), steps, strict=True):
        for name in ("0.weight", "2.weight"):
            assert np.linalg.norm(moved[name]) == pytest.approx(abs(t) * np.linalg.norm(before[name]), rel=1e-5)
        # Gains and biases stay.
        assert all(not moved[name].any() for name in moved if before[name].ndim == 1)
    assert np.allclose(steps[1]["0.weight"], -steps[4]["0.weight"], atol=1e-7)  # one line through the model


def test_vectors_move_where_that_is_asked_for() -> None:
    moved = []

    def measure(model: Any) -> Reading:
        moved.append(not torch.equal(model[1].weight, torch.ones(8)))
        return Reading(0.0, 0.0, 1.0)

    safety_basin(network(), measure, points=3, vectors=True)
    assert moved == [False, True, True]


def test_a_direction_belongs_to_its_seed_and_tensor() -> None:
    tensor = torch.randn(5, 4)
    assert torch.equal(direction_like(tensor, "0/0/a"), direction_like(tensor, "0/0/a"))
    assert not torch.equal(direction_like(tensor, "0/0/a"), direction_like(tensor, "1/0/a"))
    assert not torch.equal(direction_like(tensor, "0/0/a"), direction_like(tensor, "0/0/b"))
    assert float(direction_like(tensor, "x").norm()) == pytest.approx(float(tensor.norm()), rel=1e-6)
    assert not direction_like(torch.zeros(3, 3), "x").any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_as_before_bit_for_bit(dtype: torch.dtype) -> None:
    net = network(dtype)
    before = state(net)
    safety_basin(net, lambda model: Reading(0.0, 0.0, 1.0), directions=2, points=5)
    assert state(net) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_weights_are_as_before_after_an_exception(error: type[BaseException]) -> None:
    net, calls = network(), []
    before = state(net)

    def measure(model: Any) -> Reading:
        calls.append(state(model) == before)
        if len(calls) == 3:
            raise error("in the middle")
        return Reading(0.0, 0.0, 1.0)

    with pytest.raises(error, match="in the middle"):
        safety_basin(net, measure, points=5)
    assert calls == [True, False, False]
    assert state(net) == before


def test_tied_weights_move_together_and_come_back(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    before = state(net)
    same = []
    safety_basin(net, lambda m: same.append(m[0].weight is m[1].weight) or Reading(0.0, 0.0, 1.0), points=3)
    assert all(same)
    assert state(net) == before


def test_put_back_gives_copies() -> None:
    net = network()
    parameters = dict(net.named_parameters())
    with put_back(parameters) as saved, torch.no_grad():
        parameters["0.weight"].fill_(float("nan"))
        assert not saved["0.weight"].isnan().any()
    assert not parameters["0.weight"].isnan().any()


def test_visage_is_the_mean_margin_where_there_is_one() -> None:
    # Margins 1 - S where S < 1: 0.5, 0.9, 0.6 of five points; (0.5 + 0.9 + 0.6) / 3.
    assert shares(1.0, 0.5, 0.1, 0.4, 1.0).visage() == pytest.approx(2.0 / 3)
    assert shares(1.0, 1.0, 1.0).visage() == 0.0
    assert shares(None, None, None).visage() is None
    assert shares(None, 0.2, None).visage() == pytest.approx(0.8)


def test_unreadable_points_can_be_left_out_of_visage() -> None:
    # A guard takes gibberish for safe: at both ends nothing unsafe is said, and nothing else either.
    points = (Reading(1.0, 0.0, 0.0), Reading(0.4, 0.4, 1.0), Reading(1.0, 0.0, 0.1))
    basin = Basin((-0.5, 0.0, 0.5), (points,))
    assert basin.visage("unsafe") == pytest.approx((1.0 + 0.6 + 1.0) / 3)
    assert basin.visage("unsafe", readable_only=True) == pytest.approx(0.6)


def test_the_edges_are_where_the_share_first_rises() -> None:
    # From 0.1 at 0, up to 0.2 counts: one step to the left, two to the right; the far left is safe again and outside.
    assert shares(0.0, 0.9, 0.2, 0.1, 0.15, 0.2, 0.8).edges() == pytest.approx((-1 / 6, 1 / 3))
    assert shares(0.5, None, 0.5).edges() is None
    assert shares(None, 0.5, None).edges() == (0.0, 0.0)


def test_directions_are_averaged_point_by_point() -> None:
    one, other = (Reading(0.2, None, 1.0), Reading(0.0, 0.0, 1.0)), (Reading(0.6, 0.3, 0.5), Reading(0.0, None, 1.0))
    basin = Basin((-0.5, 0.0), (one, other))
    assert basin.mean("complied") == pytest.approx((0.4, 0.0))
    assert basin.mean("unsafe") == pytest.approx((0.3, 0.0))  # what could not be told is in no mean


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"points": 4}, "odd number"),
        ({"points": 1}, "3 or more"),
        ({"reach": 0.0}, "above 0"),
        ({"directions": 0}, "1 or more"),
    ],
)
def test_bad_values_say_what_to_write(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        safety_basin(network(), lambda model: Reading(0.0, 0.0, 1.0), **options)


def test_the_picture_has_every_curve_and_a_gap_where_nothing_was_told() -> None:
    basin = Basin((-0.5, 0.0, 0.5), (tuple(Reading(0.1, s, 1.0) for s in (0.2, None, 0.3)),))
    root = ElementTree.fromstring(basin_figure(basin, "A < B & C"))
    lines = [node for node in root.iter() if node.tag.endswith("polyline")]
    # One for no refusal, two pieces for unsafe, one for readable.
    assert [len(line.attrib["points"].split()) for line in lines] == [3, 1, 1, 3]
    assert "A < B & C" in [node.text for node in root.iter()]


@pytest.mark.model
def test_the_basin_of_a_tiny_model_from_the_command_line(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    result = CliRunner().invoke(
        cli.app,
        ["restore", "basin", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--guard", "rules",
         "--points", "3", "--max-prompts", "3", "--max-new-tokens", "4", "--dtype", "float32"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "basin.json").read_text())
    assert found["distances"] == [-0.5, 0.0, 0.5]
    assert found["prompts"] == 3
    assert found["visage"]["complied"] == 0.0  # a random model refuses nothing
    assert "VISAGE by no refusal: 0%" in result.stdout
    assert ElementTree.parse(tmp_path / "out" / "basin.svg")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
