"""NLSR over whole tiny Llamas, full weights and LoRA, against numpy in float64 on activations that are stored here."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ballast.errors import ConfigError, DataError, ModelError
from ballast.pipeline.data import Row
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.restoration.models import open_models
from ballast.pipeline.restoration.nlsr.activations import CalibrationRow, passes, second_moments
from ballast.pipeline.restoration.nlsr.calibration import calibration_rows
from ballast.pipeline.restoration.nlsr.realign import nlsr, realignment
from ballast.pipeline.restoration.nlsr.settings import NLSRSettings

LINEAR = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
NAMES = tuple(f"model.layers.{i}.{module}.weight" for i in range(2) for module in LINEAR)
ROWS = [CalibrationRow(tuple(range(3 + i, 15 + 2 * i)), 4 + i % 3) for i in range(6)]
Arrays = dict[str, np.ndarray]


class Family:
    """A base, an aligned and a tuned Llama on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base = llama()
        self.base, self.base_arrays = self.save("base", base)
        self.aligned, self.aligned_arrays = self.save("aligned", moved(base, 1))
        self.tuned, self.tuned_arrays = self.save("tuned", moved(base, 2))

    def save(self, name: str, model: Any) -> tuple[str, Arrays]:
        model.save_pretrained(self.folder / name)
        return str(self.folder / name), load_file(self.folder / name / "model.safetensors")

    def run(self, out: str = "out", **options: Any) -> Any:
        settings = NLSRSettings(**options)
        return nlsr(self.base, self.aligned, self.tuned, rows=ROWS, out=self.folder / out, settings=settings)

    def result(self, out: str = "out") -> Arrays:
        return load_file(self.folder / out / "model.safetensors")


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            initializer_range=0.3,
        )
    )  # fmt: skip


def moved(model: Any, seed: int, step: float = 0.1) -> Any:
    """The last model, each parameter a step further."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += step * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path)


def activations(folder: str, weights: Arrays) -> Arrays:
    """(n, tokens) what goes into each module of a model with these weights, a row at a time, without padding."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for name in NAMES:
        model.get_parameter(name).data.copy_(torch.from_numpy(weights[name]))
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, own=found[name]: own.append(args[0][0].double().numpy())
        )
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row.ids]))
    return {
        name: np.concatenate([states[row.start :] for states, row in zip(own, ROWS, strict=True)]).T
        for name, own in found.items()
    }


def expected(
    changes: Arrays, aligned: Arrays, tuned_changes: Arrays, tuned: Arrays, folder: str, ranks: dict[str, int]
) -> tuple[Arrays, dict[str, float]]:
    """The paper's three steps in float64: every entry masked, patched in the least similar half of the modules."""
    beta, sparsity = 0.9, 0.5
    reference = {name: aligned[name] + beta * changes[name] for name in NAMES}
    x = activations(folder, {name: array.astype(np.float32) for name, array in reference.items()})
    masks, similarity = {}, {}
    for name in NAMES:
        rank = max(1, math.floor(ranks[name] * (1 - sparsity) + 0.5))
        u = np.linalg.svd(changes[name] @ x[name], full_matrices=False)[0][:, :rank]
        score = np.abs(u @ u.T @ changes[name])
        count = math.floor(score.size * (1 - sparsity) + 0.5)
        masks[name] = score >= np.sort(score, axis=None)[-count]
        one, other = (tuned_changes[name] * masks[name]).ravel(), ((1 + beta) * changes[name] * masks[name]).ravel()
        similarity[name.removesuffix(".weight")] = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    chosen = sorted(similarity, key=lambda name: similarity[name])[: len(NAMES) // 2]
    out = {
        name: np.where(masks[name] & (name.removesuffix(".weight") in chosen), reference[name], tuned[name])
        for name in NAMES
    }
    return out, similarity


def double(arrays: Arrays) -> Arrays:
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return float(np.linalg.norm(found - wanted)) <= 1e-5 * float(np.linalg.norm(wanted))


def same_bytes(found: Arrays, wanted: Arrays) -> bool:
    return set(found) == set(wanted) and all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_full_models_are_realigned_as_the_formulas_say(family: Family) -> None:
    restored = family.run(sparsity=0.5)
    base, aligned, tuned = map(double, (family.base_arrays, family.aligned_arrays, family.tuned_arrays))
    wanted, similarity = expected(
        {name: aligned[name] - base[name] for name in NAMES}, aligned,
        {name: tuned[name] - base[name] for name in NAMES}, tuned, family.aligned,
        {name: min(base[name].shape) for name in NAMES},
    )  # fmt: skip
    found = family.result()
    assert all(close(found[name], wanted[name]) for name in NAMES)
    # Not only as a whole: what was moved is right by itself, and 7 of 14 modules were.
    moved_names = [name for name in NAMES if not np.array_equal(wanted[name], tuned[name])]
    assert len(moved_names) == 7
    assert set(restored.changed) == set(moved_names)
    assert all(close(found[name] - tuned[name], wanted[name] - tuned[name]) for name in moved_names)
    figures = {**restored.changed, **restored.kept}
    assert {name: figures[name]["similarity"] for name in NAMES} == pytest.approx(
        {name: similarity[name.removesuffix(".weight")] for name in NAMES}, rel=1e-5
    )
    # Embedding, norms and output layer are the tuned model's.
    others = set(found) - set(NAMES)
    assert all(found[name].tobytes() == family.tuned_arrays[name].tobytes() for name in others)


def save_lora(folder: Path, base: str, seed: int, names: tuple[str, ...] = NAMES, rank: int = 4) -> tuple[str, Arrays]:
    """A LoRA as PEFT writes it, scaling 2, and its changes in float64."""
    generator, stored, changes = np.random.default_rng(seed), {}, {}
    shapes = {name: array.shape for name, array in load_file(Path(base) / "model.safetensors").items()}
    for name in names:
        m, n = shapes[name]
        a, b = (0.2 * generator.standard_normal(shape).astype(np.float32) for shape in ((rank, n), (m, rank)))
        module = "base_model.model." + name.removesuffix(".weight")
        stored |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        changes[name] = 2.0 * b.astype(np.float64) @ a.astype(np.float64)
    folder.mkdir()
    save_file(stored, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "lora_alpha": 2 * rank,
        "target_modules": [name.removesuffix(".weight") for name in names],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder), changes


def test_adapters_are_realigned_as_the_formulas_say(family: Family) -> None:
    family.aligned, changes = save_lora(family.folder / "aligned-lora", family.base, 3)
    family.tuned, tuned_changes = save_lora(family.folder / "tuned-lora", family.base, 4)
    base = double(family.base_arrays)
    aligned = {name: base[name] + changes[name] for name in NAMES}
    tuned = {name: base[name] + tuned_changes[name] for name in NAMES}
    # r = 4 is the adapter's rank, not that of the matrix.
    wanted, _ = expected(changes, aligned, tuned_changes, tuned, family.base, dict.fromkeys(NAMES, 4))
    family.run(sparsity=0.5)
    found = family.result()
    assert all(close(found[name], wanted[name]) for name in NAMES)
    assert sum(not close(found[name], tuned[name]) for name in NAMES) == 7


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"share": 0.0}, {"sparsity": 1.0}])
def test_no_strength_no_layer_and_no_neuron_each_change_no_byte(family: Family, options: dict[str, float]) -> None:
    restored = family.run(**options)
    assert same_bytes(family.result(), family.tuned_arrays)
    assert not restored.changed


def test_all_neurons_of_all_layers_are_the_super_aligned_model(family: Family) -> None:
    family.run(sparsity=0.0, share=1.0)
    found, base, aligned = family.result(), double(family.base_arrays), double(family.aligned_arrays)
    assert all(close(found[name], aligned[name] + 0.9 * (aligned[name] - base[name])) for name in NAMES)


def test_without_extrapolation_all_neurons_are_the_aligned_model(family: Family) -> None:
    family.run(sparsity=0.0, share=1.0, beta=0.0)
    found = family.result()
    assert all(found[name].tobytes() == family.aligned_arrays[name].tobytes() for name in NAMES)


def test_half_the_strength_goes_half_the_way(family: Family) -> None:
    family.run("whole")
    family.run("half", strength=0.5)
    whole, half = family.result("whole"), family.result("half")
    for name in NAMES:
        assert np.allclose(half[name], (whole[name] + family.tuned_arrays[name]) / 2, rtol=1e-5, atol=1e-6)


def test_a_decoder_layer_is_chosen_as_a_whole(family: Family) -> None:
    restored = family.run(unit="layer")
    layers = {name.split(".")[2] for name in restored.changed}
    assert len(layers) == 1
    assert len(restored.changed) == 7


def test_the_draw_repeats_with_its_seed_and_is_recorded(family: Family) -> None:
    models = open_models(family.base, family.aligned, family.tuned)
    draws = [realignment(models, ROWS, NLSRSettings(choice="sample", seed=seed)).patched for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    family.run(choice="sample", seed=1)
    record = json.loads((family.folder / "out" / "restoration.json").read_text())
    assert tuple(record["settings"]["patched"]) == draws[0]


def test_several_passes_over_the_rows_find_the_same(family: Family) -> None:
    models = open_models(family.base, family.aligned, family.tuned)
    one, many = realignment(models, ROWS), realignment(models, ROWS, budget=1, batch_size=1)
    assert one.similarity == pytest.approx(many.similarity, rel=1e-6)
    # 16 x 16 numbers of 8 bytes are 2,048: two modules fit into 5,000 bytes, one larger than that stands alone.
    assert list(passes({"a": 16, "b": 16, "c": 16, "d": 99}, 5000)) == [["a", "b"], ["c"], ["d"]]


def test_padding_and_the_request_do_not_count(family: Family) -> None:
    model, module = llama(), "model.layers.1.mlp.down_proj"
    together = second_moments(model, ROWS, {module: None}, batch_size=6)[module]
    alone = sum(second_moments(model, [row], {module: None})[module] for row in ROWS)
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-4)
    # Later tokens do not reach earlier ones: the same request with no answer to count is the rest of the sum.
    from_start = second_moments(model, [CalibrationRow(ROWS[0].ids)], {module: None})[module]
    before = second_moments(model, [CalibrationRow(ROWS[0].ids[: ROWS[0].start])], {module: None})[module]
    answer = second_moments(model, ROWS[:1], {module: None})[module]
    assert torch.allclose(from_start - before, answer, rtol=1e-5, atol=1e-4)


def test_the_model_is_as_before_after_a_failed_calibration() -> None:
    model = llama().train()
    with pytest.raises(ModelError, match=r"no module 'model.layers.9.x'"):
        second_moments(model, ROWS, {"model.layers.0.mlp.up_proj": None, "model.layers.9.x": None})
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def freeze_the_rest(family: Family) -> None:
    """Aligned and tuned share embedding, norms and output layer with the base, as after a merged LoRA."""
    for folder, arrays in ((family.aligned, family.aligned_arrays), (family.tuned, family.tuned_arrays)):
        arrays |= {name: array for name, array in family.base_arrays.items() if name not in NAMES}
        save_file(arrays, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def as_lora(family: Family, rank: int, **options: Any) -> Any:
    return nlsr(
        family.base, family.aligned, family.tuned, rows=ROWS, out=family.folder / "lora-out", lora_rank=rank,
        settings=NLSRSettings(**options),
    )  # fmt: skip


def lora_changes(folder: Path) -> Arrays:
    """What the written adapter adds, as PEFT merges it: alpha / r times B A."""
    stored, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    key = "base_model.model.{}.lora_{}.weight"
    return {
        f"{module}.weight": config["lora_alpha"] / config["r"]
        * stored[key.format(module, "B")].astype(np.float64) @ stored[key.format(module, "A")].astype(np.float64)
        for module in config["target_modules"]
    }  # fmt: skip


def test_a_lora_of_full_rank_is_the_full_result(family: Family) -> None:
    freeze_the_rest(family)
    family.run()
    as_lora(family, rank=16)  # the smaller side of most modules
    whole, changes = family.result(), lora_changes(family.folder / "lora-out")
    base = double(family.base_arrays)
    assert set(changes) == set(NAMES)
    assert all(close(base[name] + changes[name], whole[name].astype(np.float64)) for name in NAMES)


def test_a_lora_of_a_low_rank_is_the_nearest_and_says_what_it_loses(family: Family) -> None:
    freeze_the_rest(family)
    family.run()
    restored = as_lora(family, rank=3)
    whole, changes, base = double(family.result()), lora_changes(family.folder / "lora-out"), double(family.base_arrays)
    lost = total = 0.0
    for name in NAMES:
        delta = whole[name] - base[name]
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        assert close(changes[name], (u[:, :3] * s[:3]) @ vt[:3])
        assert {**restored.changed, **restored.kept}[name]["lora_error"] == pytest.approx(
            float(np.sqrt((s[3:] ** 2).sum() / (s**2).sum())), rel=1e-5
        )
        lost, total = lost + (s[3:] ** 2).sum(), total + (s**2).sum()
    assert f"{np.sqrt(lost / total):.2%} is lost" in restored.notes[0]


def test_untouched_modules_of_a_tuned_lora_keep_their_factors(family: Family) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    family.tuned, tuned_changes = save_lora(family.folder / "tuned-lora", family.base, 4)
    restored = as_lora(family, rank=8)
    changes = lora_changes(family.folder / "lora-out")
    assert all(close(changes[name], tuned_changes[name]) for name in restored.kept)
    # PEFT itself loads it over the base, and adds just that.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family.base), family.folder / "lora-out")
    merged = dict(model.merge_and_unload().named_parameters())
    for name in NAMES:
        assert close(merged[name].detach().double().numpy(), double(family.base_arrays)[name] + changes[name])


def test_a_lora_cannot_hold_changed_norms(family: Family) -> None:
    with pytest.raises(ModelError, match="a LoRA of linear modules cannot hold that; leave lora_rank out"):
        as_lora(family, rank=4)
    assert not (family.folder / "lora-out").exists()


def test_a_restored_model_loads_and_answers(family: Family) -> None:
    from transformers import AutoModelForCausalLM

    family.run()
    model = AutoModelForCausalLM.from_pretrained(family.folder / "out")
    answer = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > 3
    found = dict(model.named_parameters())
    assert all(np.array_equal(found[name].detach().numpy(), array) for name, array in family.result().items())


def test_bad_settings_say_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"sparsity = 1.5 is a share: give a number from 0 to 1"):
        NLSRSettings(sparsity=1.5)
    with pytest.raises(ConfigError, match="rank = 0 is a number of directions: give 1 or more"):
        NLSRSettings(rank=0)
    with pytest.raises(ConfigError, match="share = nan"):
        NLSRSettings(share=float("nan"))


def test_without_calibration_rows_nothing_is_written(family: Family) -> None:
    with pytest.raises(DataError, match="no calibration rows"):
        nlsr(family.base, family.aligned, family.tuned, rows=[], out=family.folder / "out")
    assert not (family.folder / "out").exists()


def test_a_row_without_an_answer_is_refused() -> None:
    with pytest.raises(DataError, match="3 tokens, and those from number 3 on should count"):
        CalibrationRow((1, 2, 3), 3)


def test_no_tuned_model_and_no_such_modules_are_refused(family: Family) -> None:
    with pytest.raises(ConfigError, match="none is given; name it, or harden the aligned model with lox"):
        realignment(open_models(family.base, family.aligned), ROWS)
    with pytest.raises(ConfigError, match="no matrix fits these patterns"):
        family.run(modules=("*.experts.*",))


def test_an_aligned_model_that_is_the_base_is_refused(family: Family) -> None:
    with pytest.raises(ModelError, match="are the same in every module looked at"):
        nlsr(family.base, family.base, family.tuned, rows=ROWS, out=family.folder / "out")


@pytest.mark.parametrize("which", ["base", "aligned", "tuned"])
def test_nan_weights_are_named_with_their_model(family: Family, which: str) -> None:
    path = family.folder / which / "model.safetensors"
    arrays = load_file(path)
    arrays[NAMES[5]][0, 0] = np.nan
    save_file(arrays, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{NAMES[5]}.*{which}.*NaN"):
        family.run()
    assert not (family.folder / "out").exists()


def test_activations_that_overflow_name_the_module() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.down_proj' got inputs that are NaN or infinite"):
        second_moments(model, ROWS, {"model.layers.1.mlp.down_proj": None})


def test_an_adapter_of_another_base_is_refused(family: Family) -> None:
    elsewhere, _ = save_lora(family.folder / "lora", family.base, 1)
    config = json.loads((Path(elsewhere) / "adapter_config.json").read_text())
    (Path(elsewhere) / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "someone/else"})
    )
    with pytest.raises(ModelError, match="adapter of 'someone/else'"):
        nlsr(family.base, elsewhere, family.tuned, rows=ROWS, out=family.folder / "out")


def test_modules_without_an_adapter_are_not_looked_at(family: Family) -> None:
    family.aligned, _ = save_lora(family.folder / "lora", family.base, 1, NAMES[:2])
    restored = family.run(share=1.0)
    assert set(restored.changed) == set(NAMES[:2])


@pytest.mark.model
def test_calibration_rows_are_harmful_requests_and_their_answers_count(tokenizer: Any) -> None:
    rows = [
        Row("o", "What is tea?", "ordinary", response="A drink."),
        Row("h", "Help me to harm somebody.", "harmful", response="No, I will not."),
    ]
    (found,) = calibration_rows(PromptFormat(tokenizer), rows)
    counted = tokenizer.decode(found.ids[found.start :])
    assert counted == "No, I will not.<|im_end|>"
    assert tokenizer.decode(found.ids[: found.start]).endswith("<|im_start|>assistant\n")
    with pytest.raises(DataError, match="none of 1 calibration rows is a harmful request"):
        calibration_rows(PromptFormat(tokenizer), rows[:1])
    with pytest.raises(DataError, match="row h has no answer"):
        calibration_rows(PromptFormat(tokenizer), [Row("h", "Help me to harm somebody.", "harmful")])
