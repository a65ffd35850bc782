"""Checkpoints are read and written tensor by tensor, and what cannot be used is named with its tensor."""

import errno
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from tests.pipeline.restoration.checkpoints import CONFIG, MATRICES, SHAPES, arrays, load, lora, save, save_shards

from ballast.errors import ConfigError, ModelError
from ballast.pipeline.restoration.adapters import Adapter
from ballast.pipeline.restoration.lox import Lox
from ballast.pipeline.restoration.models import open_models
from ballast.pipeline.restoration.output import RestorationError
from ballast.pipeline.restoration.restore import restore
from ballast.pipeline.restoration.shard_writer import plan_shards, write_shards
from ballast.pipeline.restoration.shards import Checkpoint, TensorSpec
from ballast.pipeline.restoration.task_arithmetic import Resta

FIRST = MATRICES[0]


def run(three, out="out", method=None, shard_bytes=10**9, **names):
    given = {"base": three.base, "aligned": three.aligned, "tuned": three.tuned} | names
    return restore(method or Lox(rank=2), open_models(**given), three.folder / out, shard_bytes=shard_bytes)


def test_what_is_written_safetensors_reads_back_to_the_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(1.5),
        "double": torch.randn(7).double(),
        "flags": torch.tensor([True, False, True]),
        "count": torch.arange(3),
        "transposed": torch.randn(4, 6).T,
        "empty": torch.empty(0, 4),
    }
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    digests = write_shards(tmp_path, specs, tensors.__getitem__, 10**6)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    from ballast.models import file_sha256

    assert digests == {"model.safetensors": file_sha256(tmp_path / "model.safetensors")}


def test_a_shard_is_within_its_bound_unless_one_tensor_is_larger():
    sizes = {"a": 4, "b": 4, "c": 20, "d": 4, "e": 4, "f": 4}
    specs = [TensorSpec(name, torch.uint8, (size,)) for name, size in sizes.items()]
    shards = plan_shards(specs, 10)
    # 4 + 4, then 20 alone, then 4 + 4, and 4 that would make it 12
    assert [[spec.name for spec in shard] for shard in shards] == [["a", "b"], ["c"], ["d", "e"], ["f"]]


def test_several_shards_are_read_and_written_as_one_model(three):
    sharded = save_shards(three.folder / "sharded", three.tuned_arrays)
    run(three, "one")
    run(three, "many", tuned=sharded, shard_bytes=600)
    files = sorted(path.name for path in (three.folder / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = load(three.folder / "one"), load(three.folder / "many")
    assert all(np.array_equal(one[name], many[name]) for name in SHAPES)
    index = json.loads((three.folder / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(SHAPES)
    assert index["metadata"]["total_size"] == 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert set(Checkpoint(three.folder / "many", "tuned").names) == set(SHAPES)  # what is written can be read again


def test_half_precision_is_computed_in_fp32_and_cast_once(three):
    folder = three.folder / "half"
    shutil.copytree(three.tuned, folder)
    half = {name: torch.tensor(value).bfloat16() for name, value in three.tuned_arrays.items()}
    save_file(half, folder / "model.safetensors")
    run(three, method=Resta(gamma=0.01), tuned=str(folder))
    found = load_file(three.folder / "out" / "model.safetensors")
    for name in SHAPES:
        vector = torch.tensor(three.aligned_arrays[name]) - torch.tensor(three.base_arrays[name])
        assert torch.equal(found[name], (half[name].float() + 0.01 * vector).bfloat16())


def test_what_belongs_to_the_model_goes_along_and_what_belongs_to_training_does_not(three):
    tuned = Path(three.tuned)
    kept = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt")
    for name in (*kept, "training_args.bin", "trainer_state.json", "README.md"):
        (tuned / name).write_text(name)
    run(three)
    found = {path.name for path in (three.folder / "out").iterdir()}
    assert found == {*kept, "config.json", "model.safetensors", "restoration.json", "manifest.json", "README.md"}
    assert (three.folder / "out" / "README.md").read_text() != "README.md"  # that of the tuned model is not of this one
    assert all((three.folder / "out" / name).read_text() == name for name in kept)


def test_the_prompt_format_of_the_tuned_model_stays_and_its_weights_are_recorded_anew(three):
    from ballast.models import file_sha256
    from ballast.pipeline.template_contract import TemplateContract

    tuned = Path(three.tuned)
    contract = TemplateContract("{{ messages }}", {}, {}, "", None, "Be kind.", {}, "consistent", "Be kind.", {})
    record = {
        "fingerprint": contract.fingerprint(),
        "contract": contract.to_json(),
        "weights_sha256": {"model.safetensors": file_sha256(tuned / "model.safetensors")},
    }
    (tuned / "prompt_format.json").write_text(json.dumps(record))
    run(three)
    found = json.loads((three.folder / "out" / "prompt_format.json").read_text())
    digest = file_sha256(three.folder / "out" / "model.safetensors")
    assert found == {**record, "weights_sha256": {"model.safetensors": digest}}


def test_a_tuned_model_that_is_not_what_its_record_says_is_refused(three):
    record = {"fingerprint": "f", "system_prompt": None, "weights_sha256": {"model.safetensors": "0" * 64}}
    (Path(three.tuned) / "prompt_format.json").write_text(json.dumps(record))
    refused(three, ModelError, "model.safetensors changed after training")


def refused(three, error, match, **names):
    """It is refused with this message, and nothing is written: no output, and no input changed."""
    before = {path: path.read_bytes() for path in three.folder.rglob("*") if path.is_file()}
    with pytest.raises(error, match=match):
        run(three, **names)
    assert {path: path.read_bytes() for path in three.folder.rglob("*") if path.is_file()} == before


def changed(three, name, **tensors):
    """A copy of the tuned checkpoint with other tensors."""
    return save(three.folder / name, {**three.tuned_arrays, **tensors})


def test_an_output_that_is_an_input_is_refused(three):
    for out in ("tuned", "base", "tuned/../aligned"):
        refused(three, ConfigError, "never written over", out=out)


def test_an_output_that_holds_an_input_is_refused(three):
    refused(three, ConfigError, "never written over", out="")


def test_an_output_that_holds_something_is_refused_and_an_empty_folder_is_taken(three):
    (three.folder / "out").mkdir()
    run(three)
    refused(three, ConfigError, "not empty")


def test_another_architecture_is_refused(three):
    other = save(three.folder / "other", three.tuned_arrays, {**CONFIG, "model_type": "qwen2"})
    refused(three, ModelError, "different architectures.*qwen2.*llama", tuned=other)


def test_another_vocabulary_is_refused_with_the_tensor(three):
    other = changed(three, "other", **{"model.embed_tokens.weight": np.zeros((13, 8), np.float32)})
    refused(three, ModelError, r"'model\.embed_tokens\.weight' is 13 x 8 .* 12 x 8 .*resize", tuned=other)


def test_another_shape_is_refused_with_the_tensor(three):
    other = changed(three, "other", **{FIRST: np.zeros((8, 9), np.float32)})
    refused(three, ModelError, rf"'{FIRST}' is 8 x 9 .* 8 x 8", tuned=other)


def test_a_tensor_that_is_not_there_is_refused(three):
    lacking = {name: value for name, value in three.tuned_arrays.items() if name != FIRST}
    refused(three, ModelError, f"'{FIRST}' is in base .* not in tuned", tuned=save(three.folder / "other", lacking))


def test_fused_matrices_against_separate_ones_are_refused(three):
    fused = {n: v for n, v in three.tuned_arrays.items() if "_proj" not in n or "mlp" in n}
    fused["model.layers.0.self_attn.qkv_proj.weight"] = np.zeros((16, 8), np.float32)
    fused |= {n: v for n, v in three.tuned_arrays.items() if "self_attn" in n}
    refused(three, ModelError, "qkv_proj.*fused", tuned=save(three.folder / "other", fused))


def test_a_missing_shard_is_named_with_a_tensor_of_it(three):
    sharded = Path(save_shards(three.folder / "sharded", three.tuned_arrays))
    (sharded / "part-004.safetensors").unlink()
    refused(
        three,
        ModelError,
        r"shard 'part-004.safetensors' is missing; it holds tensor 'model\.layers",
        tuned=str(sharded),
    )


def test_a_shard_that_is_cut_short_is_named(three):
    sharded = Path(save_shards(three.folder / "sharded", three.tuned_arrays))
    path = sharded / "part-004.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refused(three, ModelError, "'part-004.safetensors' cannot be read.*cut short", tuned=str(sharded))


def test_an_index_of_other_shards_is_refused(three):
    sharded = Path(save_shards(three.folder / "sharded", three.tuned_arrays))
    save_numpy({"else": np.zeros(3)}, sharded / "part-004.safetensors")
    refused(three, ModelError, "should be in shard 'part-004.safetensors' and is not", tuned=str(sharded))


def test_an_index_cannot_lead_out_of_its_folder(three):
    sharded = Path(save_shards(three.folder / "sharded", three.tuned_arrays))
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {FIRST: "../tuned/model.safetensors"}}))
    refused(three, ModelError, "is missing", tuned=str(sharded))


def test_a_tied_output_layer_is_not_stored_twice(three):
    config = {**CONFIG, "tie_word_embeddings": True}
    plain = {name: value for name, value in three.tuned_arrays.items() if name != "lm_head.weight"}
    twice = {**plain, "lm_head.weight": plain["model.embed_tokens.weight"]}
    tied = save(three.folder / "t", plain, config), save(three.folder / "u", twice, config)
    run(three, base=tied[0], aligned=tied[1], tuned=tied[1], method=Resta())
    assert set(load(three.folder / "out")) == set(plain)


def test_a_tied_output_layer_with_values_of_its_own_is_refused(three):
    other = save(three.folder / "other", three.tuned_arrays, {**CONFIG, "tie_word_embeddings": True})
    refused(three, ModelError, r"'lm_head\.weight' .* tied to 'model\.embed_tokens\.weight'", tuned=other)


def test_a_tied_model_and_one_that_is_not_are_refused(three):
    plain = {name: value for name, value in three.tuned_arrays.items() if name != "lm_head.weight"}
    other = save(three.folder / "other", plain, {**CONFIG, "tie_word_embeddings": True})
    refused(three, ModelError, r"'lm_head\.weight' is in base .* both tied, or both untied", tuned=other)


def test_a_quantised_checkpoint_is_refused_by_its_config_and_by_its_tensors(three):
    quantised = {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
    by_config = save(three.folder / "config", three.tuned_arrays, quantised)
    by_tensor = changed(three, "tensor", **{FIRST: np.zeros((8, 8), np.int8)})
    refused(three, ModelError, r"quantised \(gptq\)", tuned=by_config)
    refused(three, ModelError, rf"'{FIRST}' .* quantised \(I8\)", tuned=by_tensor)


@pytest.mark.parametrize("label", ["base", "aligned", "tuned"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused_with_its_tensor(three, label, value):
    bad = getattr(three, f"{label}_arrays")
    bad[FIRST][1, 2] = value
    refused(three, ModelError, f"'{FIRST}' of {label} .* holds 1 values", **{label: save(three.folder / "bad", bad)})


def test_a_tensor_that_no_method_looks_at_must_be_finite_too(three):
    bad = changed(three, "bad", **{"model.norm.weight": np.full(8, np.nan, np.float32)})
    refused(three, ModelError, r"'model\.norm\.weight' of tuned .* holds 8", tuned=bad)


def test_a_result_beyond_the_range_of_its_dtype_is_refused(three):
    small = {name: value.astype(np.float16) for name, value in three.tuned_arrays.items()}
    refused(
        three, RestorationError, "infinite values in torch.float16.*smaller strength",
        tuned=save(three.folder / "half", small), method=Resta(gamma=1e7),
    )  # fmt: skip


def test_a_disk_without_room_is_found_before_anything_is_written(three, monkeypatch):
    usage = shutil.disk_usage(three.folder)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(three, ConfigError, "needs 0.00 GB and its disk has 0.00 GB free")


def test_a_disk_that_fills_up_leaves_nothing_behind(three):
    # Files may not grow beyond 1000 bytes: the system refuses in the middle of a tensor, as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RestorationError, match="could not be written"):
            run(three)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in three.folder.iterdir()) == ["aligned", "base", "tuned"]


def test_a_full_disk_is_called_that(three, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ballast.pipeline.restoration.restore.copy_companions", full)
    refused(three, RestorationError, "the disk is full")


def test_an_interruption_leaves_nothing_behind(three):
    def stop(name, done, total):
        raise KeyboardInterrupt

    models = open_models(three.base, three.aligned, three.tuned)
    with pytest.raises(KeyboardInterrupt):
        restore(Lox(), models, three.folder / "out", on_tensor=stop)
    assert sorted(path.name for path in three.folder.iterdir()) == ["aligned", "base", "tuned"]


def test_a_pickle_is_not_read(three):
    folder = three.folder / "pickle"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(three, ModelError, "pickle", tuned=str(folder))


def test_an_adapter_of_another_base_is_refused(three):
    elsewhere, _ = lora(three.folder / "adapter", "someone/another-model", seed=1)
    refused(
        three, ModelError, "adapter of 'someone/another-model', which is neither base .* nor aligned .*--tuned-over",
        tuned=elsewhere,
    )  # fmt: skip


def test_an_adapter_of_a_base_that_moved_is_taken_at_the_users_word(three):
    moved, deltas = lora(three.folder / "adapter", "old/place", seed=1)
    models = open_models(three.base, three.aligned, moved, over={"tuned": "aligned"})
    assert models.tuned.base is models.aligned
    found = models.tuned.tensor(FIRST).numpy()
    assert np.allclose(found, three.aligned_arrays[FIRST] + deltas[FIRST], atol=1e-5)


def test_an_adapter_that_does_not_fit_is_refused_with_the_tensor(three):
    small = arrays(9)
    small[FIRST] = np.zeros((8, 9), np.float32)
    base = save(three.folder / "small", small)
    adapter, _ = lora(three.folder / "adapter", base, seed=1)
    with pytest.raises(ModelError, match=rf"'{FIRST}' has shape \(8, 9\) .* \(8, 8\)"):
        open_models(base, adapter)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"peft_type": "IA3"}])
def test_what_is_no_plain_lora_is_refused(three, settings):
    adapter, _ = lora(three.folder / "adapter", three.base, seed=1, **settings)
    refused(three, ModelError, "only a plain LoRA.*merge", tuned=adapter)


def test_an_adapter_is_no_base(three):
    adapter, _ = lora(three.folder / "adapter", three.base, seed=1)
    refused(three, ModelError, "base must be a full model", base=adapter)


def test_an_adapter_is_merged_as_peft_merges_it(tmp_path):
    """All that decides the scaling: rank and alpha of its own for a module, rsLoRA, and a tensor that is stored whole."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    settings = LoraConfig(
        r=2, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"],
        rank_pattern={"layers.1.self_attn.q_proj": 3}, alpha_pattern={"down_proj": 5}, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(plain, settings)
    model.save_pretrained(tmp_path / "adapter")
    adapter = Adapter(tmp_path / "adapter", "tuned", Checkpoint(tmp_path / "base", "base"))
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    merged = again.merge_and_unload().state_dict()
    assert set(merged) == set(adapter.names)
    for name in adapter.names:
        assert torch.allclose(adapter.tensor(name), merged[name], atol=1e-6), name
    assert sum(adapter.differs(name) for name in adapter.names) == 5  # 2 layers x 2 modules, and lm_head


def test_a_restored_model_loads_in_transformers_and_answers(tmp_path, tiny_model, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ballast.pipeline.prompting import PromptFormat

    for i, label in enumerate(("base", "aligned", "tuned")):
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in tiny_model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        tiny_model.save_pretrained(tmp_path / label)
        tokenizer.save_pretrained(tmp_path / label)
    models = open_models(*(str(tmp_path / label) for label in ("base", "aligned", "tuned")))
    restored = restore(Lox(rank=2), models, tmp_path / "out", shard_bytes=300_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    weights = loaded.state_dict()
    name = next(iter(restored.changed))
    assert not torch.equal(weights[name], tiny_model.state_dict()[name])
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert PromptFormat(ours).fingerprint() == PromptFormat(tokenizer).fingerprint()
    ids = PromptFormat(ours).encode([{"role": "user", "content": "Hello"}])
    answer = loaded.generate(torch.tensor([ids]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape[1] == len(ids) + 3
