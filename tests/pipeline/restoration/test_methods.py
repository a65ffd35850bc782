"""LoX, Safe LoRA and RESTA against numpy in float64, for full weights and for LoRA."""

import json

import numpy as np
import pytest
import torch
from tests.pipeline.restoration.checkpoints import MATRICES, SHAPES, close, load, lora, low_rank

from ballast.errors import ConfigError, ModelError
from ballast.pipeline.restoration.adapters import Adapter
from ballast.pipeline.restoration.low_rank import truncate
from ballast.pipeline.restoration.lox import Lox, lox
from ballast.pipeline.restoration.models import open_models
from ballast.pipeline.restoration.nlsr.lora import restore_as_lora
from ballast.pipeline.restoration.output import RestorationError
from ballast.pipeline.restoration.restore import restore
from ballast.pipeline.restoration.safe_lora import SafeLora, project
from ballast.pipeline.restoration.task_arithmetic import Resta
from ballast.pipeline.restoration.weights import Factors


def run(method, three, out, tuned="tuned", aligned=None, **options):
    models = open_models(three.base, aligned or three.aligned, None if tuned is None else str(three.folder / tuned))
    return restore(method, models, three.folder / out, **options)


def same_bytes(found, wanted):
    return set(found) == set(wanted) and all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_lox_adds_the_leading_directions_of_the_alignment(three, rank):
    run(Lox(rank=rank, alpha=1.25), three, "out")
    found = load(three.folder / "out")
    for name in SHAPES:
        b, a, t = (x[name].astype(np.float64) for x in (three.base_arrays, three.aligned_arrays, three.tuned_arrays))
        if name in MATRICES:
            assert close(found[name] - t, 1.25 * low_rank(a - b, rank))
        else:
            assert np.array_equal(found[name], t)


def test_without_a_tuned_model_the_aligned_one_is_hardened(three):
    run(Lox(rank=2, alpha=0.5), three, "out", tuned=None)
    found = load(three.folder / "out")
    for name in MATRICES:
        b, a = (x[name].astype(np.float64) for x in (three.base_arrays, three.aligned_arrays))
        assert close(found[name], a + 0.5 * low_rank(a - b, 2))


@pytest.mark.parametrize("method", [Lox(alpha=0.0), Resta(gamma=0.0), SafeLora(tau=-1.0)])
def test_strength_0_changes_no_byte_of_any_tensor(three, method):
    # -0.0 is the value that an addition of 0 would change.
    three.tuned_arrays["model.layers.0.mlp.up_proj.weight"][0, 0] = -0.0
    from safetensors.numpy import save_file

    save_file(three.tuned_arrays, three.folder / "tuned" / "model.safetensors")
    restored = run(method, three, "out")
    assert same_bytes(load(three.folder / "out"), three.tuned_arrays)
    assert not restored.changed
    assert "no tensor was changed" in restored.notes[0]


def test_full_rank_is_plain_extrapolation(three):
    run(Lox(rank=8, alpha=0.7), three, "lox")
    run(Resta(gamma=0.7, modules=("*.layers.*",)), three, "resta")
    found, plain = load(three.folder / "lox"), load(three.folder / "resta")
    for name in MATRICES:
        assert np.array_equal(found[name], plain[name])


def test_resta_adds_the_whole_vector_to_every_tensor(three):
    run(Resta(gamma=0.3), three, "out")
    found = load(three.folder / "out")
    for name in SHAPES:
        b, a, t = (x[name].astype(np.float64) for x in (three.base_arrays, three.aligned_arrays, three.tuned_arrays))
        assert close(found[name], t + 0.3 * (a - b))


def safe_lora_reference(v, d, tau):
    """The change that stays, with C written out in full."""
    v, d = v.astype(np.float64), d.astype(np.float64)
    c_d = (v @ v.T / np.linalg.norm(v)) @ d
    cosine = float((c_d * d).sum() / (np.linalg.norm(c_d) * np.linalg.norm(d)))
    return (c_d if cosine < tau else d), cosine


@pytest.mark.parametrize("tau", [0.6, 1.0])
def test_safe_lora_projects_where_the_cosine_is_below_tau(three, tau):
    restored = run(SafeLora(tau=tau), three, "out")
    found = load(three.folder / "out")
    cosines = {**restored.changed, **restored.kept}
    for name in MATRICES:
        b, a, t = (x[name].astype(np.float64) for x in (three.base_arrays, three.aligned_arrays, three.tuned_arrays))
        stays, cosine = safe_lora_reference(a - b, t - a, tau)
        assert close(found[name], a + stays)
        assert cosines[name]["cosine"] == pytest.approx(cosine, abs=1e-6)
        assert (name in restored.changed) == (cosine < tau)


@pytest.mark.parametrize("shape", [(5, 2100), (2100, 5), (40, 40)])
@pytest.mark.parametrize("thin", ["neither", "alignment", "tuning", "both"])
def test_the_projection_is_the_same_in_every_form(shape, thin):
    # 2100 columns or rows are more than one block of 1024.
    rng = np.random.default_rng(0)
    (m, n), r = shape, 3
    pairs = {k: (rng.normal(size=(m, r)), rng.normal(size=(r, n))) for k in ("alignment", "tuning")}
    v, d = (left @ right for left, right in pairs.values())
    given = {
        key: Factors(*(torch.tensor(x).float() for x in pair))
        if thin in (key, "both")
        else torch.tensor(pair[0] @ pair[1]).float()
        for key, pair in pairs.items()
    }
    projected, cosine = project(given["alignment"], given["tuning"])
    dense = projected.dense() if isinstance(projected, Factors) else projected
    wanted, wanted_cosine = safe_lora_reference(v, d, tau=2)
    assert close(dense.numpy(), wanted)
    assert cosine == pytest.approx(wanted_cosine, abs=1e-5)
    assert isinstance(projected, Factors) == (thin != "neither")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_lox_of_a_lora_works_on_its_factors_alone(three, settings, monkeypatch):
    aligned, deltas = lora(three.folder / "lora", three.base, seed=5, rank=3, **settings)
    sides = []
    from ballast.pipeline.restoration import low_rank as module

    exact = module._exact
    monkeypatch.setattr(module, "_exact", lambda matrix, rank: sides.append(matrix.shape) or exact(matrix, rank))
    run(Lox(rank=2, alpha=1.25), three, "out", aligned=aligned)
    found = load(three.folder / "out")
    for name in MATRICES:
        assert close(found[name], three.tuned_arrays[name] + 1.25 * low_rank(deltas[name], 2))
    assert set(sides) == {(3, 3)}  # r x r, whatever the size of the matrices


def test_a_rank_above_that_of_the_lora_takes_all_of_it(three):
    aligned, deltas = lora(three.folder / "lora", three.base, seed=5, rank=3)
    restored = run(Lox(rank=6, alpha=1.0), three, "out", aligned=aligned, tuned=None)
    found = load(three.folder / "out")
    for name in MATRICES:  # the aligned model is W + D, and D is added once more
        assert close(found[name], three.base_arrays[name] + 2 * deltas[name])
        assert restored.changed[name] == {"rank": 3.0, "energy": pytest.approx(1.0), "error": 0.0}


@pytest.mark.parametrize(("tuned", "rank"), [(None, 3), ("t", 5)])
def test_lox_of_loras_may_stay_a_lora_and_loses_nothing(three, tuned, rank):
    # Hardened, the change stays in the alignment's own 3 directions; repaired, 3 of the tuning and 2 more.
    aligned, _ = lora(three.folder / "a", three.base, seed=5)
    lora(three.folder / "t", aligned, seed=6)
    method = Lox(rank=2, alpha=0.8)
    run(method, three, "full", aligned=aligned, tuned=tuned)
    models = open_models(three.base, aligned, None if tuned is None else str(three.folder / tuned))
    restored = restore_as_lora(method, models, three.folder / "thin", rank)
    assert max(figures["lora_error"] for figures in restored.changed.values()) < 1e-5
    over = models.base if tuned is None else models.aligned
    again = Adapter(three.folder / "thin", "restored", over)
    full = load(three.folder / "full")
    for name in SHAPES:
        assert close(again.tensor(name).numpy(), full[name])


def test_a_method_that_looks_at_nothing_is_refused_for_a_lora_as_well(three):
    lora(three.folder / "t", three.base, seed=6)
    models = open_models(three.base, three.aligned, str(three.folder / "t"))
    with pytest.raises(ConfigError, match="lox looks at no tensor"):
        restore_as_lora(Lox(modules=("*.nothing.*",)), models, three.folder / "thin", 4)
    assert not (three.folder / "thin").exists()


def test_a_lora_that_has_not_learnt_is_written_and_said_to_be_unchanged(three):
    from safetensors.numpy import load_file, save_file

    lora(three.folder / "t", three.base, seed=6)
    file = three.folder / "t" / "adapter_model.safetensors"
    stored = {key: 0 * value if "lora_B" in key else value for key, value in load_file(file).items()}
    save_file(stored, file)
    models = open_models(three.base, three.aligned, str(three.folder / "t"))
    restored = restore_as_lora(Lox(alpha=0.0), models, three.folder / "thin", 4)
    assert "0.00% is lost" in restored.notes[0]
    assert any("no tensor was changed" in note for note in restored.notes)


def test_a_computed_buffer_that_only_the_tuned_file_has_stays_as_it_is(three):
    from safetensors.numpy import save_file

    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    three.tuned_arrays[name] = np.ones(2, dtype=np.float32)
    save_file(three.tuned_arrays, three.folder / "tuned" / "model.safetensors")
    restored = run(Resta(gamma=0.5), three, "out")
    found = load(three.folder / "out")
    assert (found[name] == 1).all()
    assert name not in restored.changed
    assert restored.unselected == 1
    models = open_models(three.base, three.aligned, three.tuned)
    with pytest.raises(ModelError, match="cannot hold that"):  # the norms; the buffer is no obstacle
        restore_as_lora(Lox(), models, three.folder / "thin", 4)


def test_a_lora_that_overflows_its_bases_dtype_is_refused_where_the_method_leaves_it_alone(three):
    from safetensors.numpy import load_file, save_file

    half = {key: value.astype(np.float16) for key, value in three.base_arrays.items()}
    save_file(half, three.folder / "base" / "model.safetensors")
    lora(three.folder / "t", three.base, seed=6)
    file = three.folder / "t" / "adapter_model.safetensors"
    # Products of 300 and 300 are beyond 65504, the largest number in fp16.
    stored = {key: np.full_like(value, 300) for key, value in load_file(file).items()}
    save_file(stored, file)
    with pytest.raises(RestorationError, match=r"torch\.float16 after merging the LoRA; give a base"):
        run(Lox(alpha=0.0), three, "out", tuned="t")
    assert not (three.folder / "out").exists()


def test_resta_and_safe_lora_take_loras_over_base_and_aligned(three):
    aligned, alignment = lora(three.folder / "a", three.base, seed=5)
    lora(three.folder / "t", aligned, seed=6)
    tuning = lora(three.folder / "again", aligned, seed=6)[1]
    run(Resta(gamma=0.4), three, "resta", tuned="t", aligned=aligned)
    restored = run(SafeLora(tau=1.0), three, "safe", tuned="t", aligned=aligned)
    plain, projected = load(three.folder / "resta"), load(three.folder / "safe")
    for name in MATRICES:
        b = three.base_arrays[name].astype(np.float64)
        assert close(plain[name], b + alignment[name] + tuning[name] + 0.4 * alignment[name])
        stays, _ = safe_lora_reference(alignment[name], tuning[name], tau=1.0)
        assert close(projected[name], b + alignment[name] + stays)
    assert len(restored.changed) == len(MATRICES)


def test_two_loras_over_one_base_differ_by_their_factors(three):
    aligned, alignment = lora(three.folder / "a", three.base, seed=5)
    tuning = lora(three.folder / "t", three.base, seed=6, rank=2, alpha=2, names=MATRICES[:3])[1]
    run(SafeLora(tau=1.0), three, "out", tuned="t", aligned=aligned)
    found = load(three.folder / "out")
    for name in MATRICES:
        b = three.base_arrays[name].astype(np.float64)
        stays, _ = safe_lora_reference(alignment[name], tuning.get(name, 0) - alignment[name], tau=1.0)
        assert close(found[name], b + alignment[name] + stays)


def test_patterns_choose_the_modules(three):
    restored = run(Lox(modules=("*.1.mlp.*", "*q_proj*")), three, "out")
    assert set(restored.changed) == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }


def test_a_pattern_that_fits_nothing_is_refused_with_names_that_would(three):
    with pytest.raises(ConfigError, match=r"looks at no tensor.*model\.layers\.0"):
        run(Lox(modules=("layers.0",)), three, "out")
    assert not (three.folder / "out").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lox(rank=0),
        lambda: Lox(alpha=-1.0),
        lambda: Lox(alpha=float("nan")),
        lambda: Resta(gamma=-0.1),
        lambda: Resta(gamma=float("inf")),
        lambda: SafeLora(tau=1.5),
    ],
)
def test_a_strength_out_of_its_range_is_refused(make):
    with pytest.raises(ConfigError, match="choose"):
        make()


def spectrum(m, n, values, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(side, len(values))))[0] for side in (m, n))
    return (u * values) @ v.T


@pytest.mark.parametrize(
    "values",
    [np.arange(1, 301) ** -0.5, np.geomspace(1, 1e-6, 300), np.r_[np.ones(8), np.zeros(292)], np.ones(300)],
    ids=["slow", "fast", "rank 8", "flat"],
)
def test_the_stated_error_of_the_randomised_decomposition_is_no_promise_too_much(values):
    """What is stated: the triplets are exact for a matrix that is this near, and hold nearly the largest energy."""
    delta = torch.tensor(spectrum(600, 700, values)).float()
    low = truncate(delta, 6, "randomised")
    u, s, v = low.u.double(), low.s.double(), low.v.double()
    d, norm = delta.double(), float(delta.double().norm())
    backward = max(float((d @ v - u * s).norm()), float((d.T @ u - v * s).norm())) / norm
    assert backward <= low.error + 1e-6
    best = float((torch.linalg.svdvals(d)[:6] ** 2).sum()) / norm**2
    assert low.energy == pytest.approx(best, rel=1e-4)
    assert torch.allclose(low.u.T @ low.u, torch.eye(6), atol=1e-5)


def test_where_the_singular_values_part_the_randomised_term_is_the_exact_one():
    values = np.r_[np.linspace(10, 5, 6), np.geomspace(2, 0.1, 200)]
    delta = spectrum(600, 700, values)
    low = truncate(torch.tensor(delta).float(), 6, "randomised")
    assert low.error < 1e-5
    assert close(low.factors().dense().numpy(), low_rank(delta, 6))


def test_the_record_says_what_was_done_to_what(three):
    restored = run(Lox(rank=3, alpha=0.5), three, "out")
    record = json.loads((three.folder / "out" / "restoration.json").read_text())
    assert record["method"] == "lox"
    assert record["settings"] == {"rank": 3, "alpha": 0.5, "modules": ["*.[0-9]*.*"], "svd": "auto"}
    assert set(record["inputs"]) == {"base", "aligned", "tuned"}
    from ballast.models import file_sha256

    for label in ("base", "aligned", "tuned"):
        digest = file_sha256(three.folder / label / "model.safetensors")
        assert record["inputs"][label]["weights_sha256"] == {"model.safetensors": digest}
    assert record["weights_sha256"] == {"model.safetensors": file_sha256(three.folder / "out" / "model.safetensors")}
    assert set(record["changed"]) == set(restored.changed) == set(MATRICES)


def test_the_function_does_what_the_method_does(three):
    run(Lox(rank=2, alpha=0.5), three, "one")
    restored = lox(three.base, three.aligned, three.tuned, out=three.folder / "two", rank=2, alpha=0.5)
    assert restored.folder == three.folder / "two"
    assert same_bytes(load(three.folder / "two"), load(three.folder / "one"))
