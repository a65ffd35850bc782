"""Frozen layers do not move, weight decay included, and an adapter keeps off them."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ballast.errors import ConfigError, ModelError
from ballast.pipeline.training.freezing import adapter_outside, freeze_layers
from ballast.pipeline.training.layers import decoder_layers, layers_path, scaled, skipped


def llama(layers: int = 4) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes))


def steps(model: Any, optimizer: Any, n: int = 3) -> None:
    ids = torch.arange(3, 15)[None]
    for _ in range(n):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("late", [False, True], ids=["before the optimizer", "after it, with gradients left"])
def test_frozen_layers_are_bit_identical_after_training_with_weight_decay(late: bool) -> None:
    model = llama()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if late:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        ids = torch.arange(3, 15)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        freeze_layers(model, [1, 2])
    else:
        freeze_layers(model, [1, 2])
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.5)
    steps(model, optimizer)
    for name, p in model.named_parameters():
        frozen = name.startswith(("model.layers.1.", "model.layers.2."))
        assert torch.equal(p, start[name]) == frozen, name


def test_a_trainer_leaves_frozen_layers_bit_identical_with_weight_decay(tmp_path: Any) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model = llama()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = freeze_layers(model, range(1, 3))
    # a layer: q 16*16, k and v 16*8 each, o 16*16, three matrices 16*32, two norms of 16
    assert frozen == 2 * (256 + 128 + 128 + 256 + 3 * 512 + 32)
    rows = Dataset.from_list([{"input_ids": list(range(3, 12)), "labels": list(range(3, 12))}] * 4)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, weight_decay=0.5, learning_rate=0.1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows).train()
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) == name.startswith(("model.layers.1.", "model.layers.2.")), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": ["q_proj", "down_proj"]},
        {"exclude_modules": ["o_proj"]},
        {"exclude_modules": r".*v_proj"},
    ],
    ids=["all-linear", "names", "names excluded", "pattern excluded"],
)
def test_an_adapter_outside_keeps_off_the_layers_and_changes_nothing_else(changes: dict[str, Any]) -> None:
    def adapted(config: Any) -> set[str]:
        model = get_peft_model(llama(12), config)
        return {name for name, _ in model.named_parameters() if "lora_A" in name}

    given = lora(**changes)
    everywhere = adapted(lora(**changes))
    outside = adapted(adapter_outside(given, llama(12), [1, 3]))
    # not 10 and 11, which begin with a 1
    assert outside == {name for name in everywhere if ".layers.1." not in name and ".layers.3." not in name}
    assert given.exclude_modules == lora(**changes).exclude_modules


def test_in_a_peft_model_the_adapters_of_the_layers_are_frozen() -> None:
    model = get_peft_model(llama(), lora())
    freeze_layers(model, [0])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name and ".layers.0." not in name for name in trained)


def test_layers_are_found_whatever_they_are_called() -> None:
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=30, n_positions=16))
    assert layers_path(gpt) == "transformer.h"
    assert len(decoder_layers(gpt)) == 3
    model = llama()
    assert decoder_layers(get_peft_model(model, lora()))[0] is model.model.layers[0]


@pytest.mark.parametrize(
    ("layers", "said"), [([4], "layers 0 to 3"), ([-1], "layer -1"), ([], "no layer"), (range(4), "adapter")]
)
def test_layers_that_cannot_be_frozen_are_refused_with_the_reason(layers: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        adapter_outside(lora(), llama(), layers)


def test_freezing_all_that_learns_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to learn"):
        freeze_layers(get_peft_model(llama(), lora()), range(4))


def test_weights_that_stand_outside_the_layers_too_are_not_frozen_in_passing() -> None:
    model = llama()
    model.extra = model.model.layers[1].mlp
    with pytest.raises(ConfigError, match="share weights"):
        freeze_layers(model, [1])
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_one_stack_of_layers_is_refused() -> None:
    model = llama()
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="0 lists of 7"):
        decoder_layers(model)


def test_a_skipped_layer_is_as_if_it_were_not_there_with_a_cache_too() -> None:
    model, ids = llama().eval(), torch.arange(3, 10)[None]
    short = llama().eval()
    del short.model.layers[1]
    short.config.num_hidden_layers = 3
    for n, layer in enumerate(short.model.layers):
        layer.self_attn.layer_idx = n
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        expected = short(input_ids=ids).logits
        with skipped(model, [1]):
            assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-6)
            first = model(input_ids=ids[:, :-1], use_cache=True)
            cached = model(input_ids=ids[:, -1:], past_key_values=first.past_key_values).logits
        assert torch.allclose(cached[:, -1], expected[:, -1], atol=1e-6)
        assert torch.equal(model(input_ids=ids).logits, plain)


def test_scaled_layers_come_back_bit_identical_even_after_an_error() -> None:
    model = llama()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    changed = set()

    def fails() -> None:
        with scaled(model, [1, 2], 1.15):
            changed.update(name for name, p in model.named_parameters() if not torch.equal(p, start[name]))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert changed == {n for n in start if n.startswith(("model.layers.1.", "model.layers.2.")) and "norm" not in n}
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
