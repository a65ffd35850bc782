"""The way of the policy's weights into the engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ballast.errors import EngineError
from ballast.pipeline.training.merge import save_merged
from ballast.pipeline.training.weight_sync import iterate_policy_weights


def with_adapter(model: Any, seed: int = 1) -> Any:
    """A LoRA whose B is not zero, so that it changes something."""
    peft_model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    torch.manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return peft_model


@pytest.mark.model
def test_every_weight_is_yielded_once_under_the_plain_architectures_names(tiny_model: Any) -> None:
    plain = {name for name, _ in tiny_model.named_parameters()}
    names = [name for name, _ in iterate_policy_weights(with_adapter(tiny_model))]
    assert sorted(names) == sorted(plain)


@pytest.mark.model
def test_yielded_weights_are_base_plus_scaled_product(tiny_model: Any) -> None:
    model = with_adapter(tiny_model)
    weights = dict(iterate_policy_weights(model))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(weights["model.layers.0.self_attn.q_proj.weight"], expected)


@pytest.mark.model
def test_base_weights_are_bit_identical_after_50_syncs_in_bfloat16(tiny_model: Any) -> None:
    model = with_adapter(tiny_model.to(torch.bfloat16))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(50):
        for _name, tensor in iterate_policy_weights(model):
            tensor.zero_()  # an engine may do what it likes with what it was given
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.model
def test_an_adapter_that_is_merged_already_is_refused(tiny_model: Any) -> None:
    model = with_adapter(tiny_model)
    model.merge_adapter()
    with pytest.raises(EngineError, match="count twice"):
        list(iterate_policy_weights(model))


@pytest.mark.model
def test_a_merged_folder_computes_what_the_adapter_computed(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from ballast.pipeline.prompting import PromptFormat

    model = with_adapter(tiny_model).eval()
    ids = torch.tensor([[1, 4093, 198, 31, 77]])
    with torch.no_grad():
        expected = model(ids).logits
    save_merged(model, tokenizer, PromptFormat(tokenizer), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert (tmp_path / "merged" / "prompt_format.json").is_file()
    assert not list((tmp_path / "merged").glob("*.bin"))


@pytest.mark.model
@pytest.mark.vllm
def test_the_engine_samples_from_the_new_weights_and_the_log_probs_follow(
    vllm_engine: Any, embedded_folder: Path, tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(embedded_folder, dtype=torch.bfloat16)
    base = {name: p.detach().clone() for name, p in policy.named_parameters()}
    model = with_adapter(policy).eval()
    prompt = tokenizer("The capital of France is")["input_ids"]

    def gap(reference: Any) -> tuple[list[int], float]:
        """What the engine writes greedily, and how far its log-probs are from the reference model's."""
        output = vllm_engine.generate([prompt], max_tokens=16, temperature=1.0, seeds=[7])[0]
        ids = list(output.token_ids)
        engine = torch.tensor([step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)])
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        trainer = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        return ids, (engine - trainer).abs().mean().item()

    try:
        with model.disable_adapter():
            before, base_gap = gap(model)
        _, stale_gap = gap(model)
        vllm_engine.load_weights(iterate_policy_weights(model))
        after, synced_gap = gap(model)
        # A second sync, with a trained embedding: the tied head has a packed copy that must follow too.
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.3)
        vllm_engine.load_weights(iterate_policy_weights(model))
        _, tied_gap = gap(model)
    finally:
        vllm_engine.load_folder(str(embedded_folder))
    restored = vllm_engine.generate([prompt], max_tokens=16, temperature=1.0, seeds=[7])[0]
    assert before != after
    assert base_gap < 0.15
    assert stale_gap > 3 * synced_gap
    assert synced_gap < 0.15
    assert tied_gap < 0.15
    assert list(restored.token_ids) == before
    assert all(
        torch.equal(p, base[n.removeprefix("base_model.model.").replace(".base_layer", "")])
        for n, p in model.named_parameters()
        if "lora" not in n and "embed" not in n
    )
