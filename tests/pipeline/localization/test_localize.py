"""Localisation: the curves against the formula, the choice of a band, and the honest "none"."""

import json
import random
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ballast.errors import DataError
from ballast.pipeline.config_safety_layers import FreezeConfig, LocalizeConfig, preset_layers
from ballast.pipeline.localization.bands import Choice, Curve, band_of_drops, band_of_gap, stable_band
from ballast.pipeline.localization.behaviour import Refusals, ablation_curve, scaled_band
from ballast.pipeline.localization.figure import figure
from ballast.pipeline.localization.gap import gap_curve, last_token_states
from ballast.pipeline.localization.localize import localize_safety_layers, matched


def llama(layers: int = 6) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


class Tokenizer:
    """Writes every token as a letter."""

    pad_token_id = 0

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + token % 26) for token in ids)


def prompts(n: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, 60) for _ in range(generator.randrange(4, 9))] for _ in range(n)]


def curve(*value: float | None, width: float = 0.01) -> Curve:
    ends = [tuple(None if v is None else v + side for v in value) for side in (-width, width)]
    return Curve(value, *ends)


def planted(gaps: list[float], n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """States in 64 dimensions, of which one tells harmful from harmless, in each layer as strongly as asked for."""
    generator = np.random.default_rng(0)
    harmless = generator.normal(size=(len(gaps), n, 64))
    harmful = generator.normal(size=(len(gaps), n, 64))
    for layer, gap in enumerate(gaps):
        harmless[layer, :, 0] += 8.0  # a common direction, so that angles within a kind are below 90 degrees
        harmful[layer, :, 0] += 8.0
        harmful[layer, :, 1] += 8.0 * gap
    return harmless, harmful


def test_the_gap_is_the_difference_of_mean_angles() -> None:
    # harmless: two vectors 90 degrees apart; harmful: 180 and 90 degrees from them, so 135 on average, minus 90
    harmless = np.array([[[1.0, 0.0], [0.0, 2.0]]])
    harmful = np.array([[[-3.0, 0.0], [-1.0, 0.0]]])
    found = gap_curve(harmless, harmful, pairs=20_000, replicates=8)
    assert found.value[0] == pytest.approx(np.pi / 4, abs=0.03)


def test_a_planted_gap_is_found_from_where_it_opens_to_where_it_stops_growing() -> None:
    harmless, harmful = planted([0, 0, 0, 0, 0.7, 1.0, 1.3, 1.3, 1.3, 1.3, 1.3, 1.3])
    for seed in range(3):
        found = band_of_gap(gap_curve(harmless, harmful, seed=seed)).band
        assert found is not None
        assert found[0] == 4
        assert 6 <= found[1] <= 7  # smoothed over three layers


@pytest.mark.parametrize(
    ("gaps", "reason"),
    [
        ([0.0] * 8, "do not part"),
        ([1.2] * 8, "from the first layer on"),
        ([0, 0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0], "up to the last layer"),
        ([0, 0, 1.0, 1.0, 1.0, 1.0, 0, 0], "closes again"),
    ],
)
def test_where_no_range_stands_out_there_is_none_and_the_reason(gaps: list[float], reason: str) -> None:
    choice = band_of_gap(curve(*(0.3 * gap for gap in gaps)))
    assert choice.band is None
    assert reason in choice.reason


def test_a_band_counts_only_where_all_seeds_agree() -> None:
    found = [Choice((4, 8), "why"), Choice((5, 9), "why"), Choice((6, 8), "why")]
    assert stable_band(found, tolerance=2) == Choice((5, 8), "why")
    assert "disagree by more than 1 layers: 4 to 8, 5 to 9, 6 to 8" in stable_band(found, tolerance=1).reason
    assert stable_band([*found, Choice(None, "flat")], 2) == Choice(None, "1 of 4 seeds found no band: flat")


def test_of_drops_the_heaviest_adjoining_layers_are_taken_and_unscored_ones_never() -> None:
    # 1-2 weigh .5, 4 alone .4, 3 is not scored and parts them
    assert band_of_drops(curve(0.0, 0.2, 0.3, None, 0.4)).band == (1, 2)
    assert band_of_drops(curve(0.0, 0.005, -0.3)).band is None


def test_states_are_those_of_each_prompt_alone_at_its_last_token() -> None:
    model, asked = llama(), prompts(7, 1)
    found = last_token_states(model, asked, batch_size=3)
    assert found.shape == (6, 7, 16)
    with torch.no_grad():
        for n, ids in enumerate(asked):
            alone = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            for layer in range(5):  # the last entry of hidden_states is normalised
                assert np.allclose(found[layer, n], alone[layer + 1][0, -1].numpy(), atol=1e-5)
    assert model.training


class ByLayer(Refusals):
    """A model in which refusals live in layers 2 and 3: leave one out, or make them louder, and they change."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, Tokenizer(), 4, 8)
        self.start = [next(layer.parameters()).norm().item() for layer in model.model.layers]

    def scores(self, prompt_ids: Any) -> np.ndarray:
        layers = self.model.model.layers
        skipped = {n for n, layer in enumerate(layers) if layer._forward_hooks}
        louder = {n for n, layer in enumerate(layers) if next(layer.parameters()).norm().item() > 1.01 * self.start[n]}
        if louder:
            return np.full(len(prompt_ids), 0.3 + 0.3 * len(louder & {2, 3}) - 0.1 * len(louder - {2, 3}))
        return np.full(len(prompt_ids), 0.2 if skipped & {2, 3} else 0.6)


def test_ablation_finds_the_layers_without_which_refusals_fall_and_leaves_the_model_as_it_was() -> None:
    model = llama()
    start = {name: p.clone() for name, p in model.state_dict().items()}
    found = ablation_curve(ByLayer(model), prompts(10, 1), prompts(5, 2), max_language_loss=100.0, replicates=20)
    assert [round(v, 6) for v in found.value] == [0, 0, 0.4, 0.4, 0, 0]  # .6 - .2
    assert band_of_drops(found).band == (2, 3)
    assert all(torch.equal(p, start[name]) for name, p in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_a_layer_without_which_language_breaks_is_not_scored() -> None:
    found = ablation_curve(ByLayer(llama()), prompts(6, 1), prompts(4, 2), max_language_loss=-100.0, replicates=5)
    assert found.value == (None,) * 6


def test_scaling_moves_the_borders_to_where_most_scary_prompts_are_refused() -> None:
    choice, tried = scaled_band(ByLayer(llama()), prompts(5, 1), start=(1, 4), alpha=1.15, reach=2)
    assert choice.band == (2, 3)
    assert tried[2, 3] == pytest.approx(0.9)
    assert len(tried) <= 10


def test_scaling_that_never_refuses_more_names_no_band() -> None:
    class Deaf(ByLayer):
        def scores(self, prompt_ids: Any) -> np.ndarray:
            return np.zeros(len(prompt_ids))

    choice, _ = scaled_band(Deaf(llama()), prompts(5, 1), (1, 4), 1.15, 2)
    assert choice.band is None
    assert "0.00" in choice.reason


@pytest.mark.parametrize("method", ["gap", "ablation", "scaling"])
def test_every_method_answers_on_a_real_model_with_what_can_be_written_down(method: str) -> None:
    model = llama()
    start = {name: p.clone() for name, p in model.state_dict().items()}
    settings = LocalizeConfig(method=method, seeds=2, replicates=5, max_new_tokens=2, reach=1, batch_size=8)
    done: list[int] = []
    found = localize_safety_layers(
        model, Tokenizer(), prompts(6, 1), prompts(6, 2), prompts(6, 3), settings, progress=done.append
    )
    assert done == [1, 1]
    assert found.layers is None or len(found.layers) == 2
    assert found.reason
    written = json.loads(json.dumps(found.to_json()))
    assert [seed["seed"] for seed in written["seeds"]] == [0, 1]
    assert len(written["curves"][0]["value"]) == 6
    assert bool(written["tried"]) == (method == "scaling")
    assert all(torch.equal(p, start[name]) for name, p in model.state_dict().items())


def test_too_few_prompts_are_refused_with_the_kind() -> None:
    with pytest.raises(DataError, match="0 scary prompts"):
        localize_safety_layers(
            llama(), Tokenizer(), prompts(6, 1), prompts(6, 2), settings=LocalizeConfig(method="scaling")
        )


def test_harmless_prompts_are_matched_in_length() -> None:
    pool = [[1] * n for n in (3, 9, 5, 20, 8)]
    chosen = matched(pool, [[2] * 8, [2] * 4, [2] * 9], random.Random(0))
    assert [len(ids) for ids in chosen[:1]] == [8]
    assert sorted(len(ids) for ids in chosen) in ([3, 8, 9], [5, 8, 9])


def test_the_figure_is_well_formed_and_shades_the_band() -> None:
    picture = figure([curve(0.0, 0.2, None, 0.3), curve(0.0, 0.1, 0.1, 0.2)], (1, 2), "gap", "radians")
    root = ET.fromstring(picture)
    tags = [child.tag.rsplit("}", 1)[-1] for child in root]
    assert tags.count("rect") == 2  # paper and band
    assert tags.count("polyline") == 3  # a layer without a score parts the first line
    assert (
        "rect" not in [child.tag.rsplit("}", 1)[-1] for child in ET.fromstring(figure([curve(0.1)], None, "", ""))][1:]
    )


def test_presets_are_published_ranges_and_else_a_fraction_that_says_so() -> None:
    assert preset_layers("meta-llama/Meta-Llama-3-8B-Instruct", 32) == (
        (6, 12),
        "published for meta-llama-3-8b-instruct (arXiv 2408.17003)",
    )
    assert preset_layers("/models/Phi-3-mini-4k-instruct/", 32)[0] == (11, 15)
    layers, reason = preset_layers("embedded:smollm2-135m", 30)
    assert layers == (11, 19)  # 30 * 15/40 = 11.25, 30 * 25/40 = 18.75
    assert "nothing is known" in reason
    assert preset_layers("x", 2)[0][1] < 2
    # the base model is another one
    assert "nothing is known" in preset_layers("meta-llama/Meta-Llama-3-8B", 32)[1]


def test_a_range_in_the_wrong_order_is_refused() -> None:
    with pytest.raises(ValueError, match="first not above last"):
        FreezeConfig(layers=(5, 3))
