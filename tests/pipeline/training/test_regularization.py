"""L2 to the start, the average of the weights, KL to the start: each against its formula written once more."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ballast.errors import ConfigError
from ballast.pipeline.training.regularization import L2ToStart, WeightAverage


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 3,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "lr_scheduler_type": "constant", "gradient_checkpointing": False,
    } | changes  # fmt: skip


def rows() -> Dataset:
    ids = torch.randint(3, 40, (12, 8), generator=torch.Generator().manual_seed(4)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": [-100, *row[1:]], "attention_mask": [1] * 8} for row in ids])


def gpt() -> Any:
    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, **none)
    return GPT2LMHeadModel(config).double()


def adapted(model: Any, **changes: Any) -> Any:
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    peft = get_peft_model(model, LoraConfig(**(options | changes)))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn_like(p))
    return peft.to(model.dtype)


def merged(model: Any) -> dict[str, torch.Tensor]:
    if hasattr(model, "peft_config"):
        model = copy.deepcopy(model).merge_and_unload()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "whole model"])
def test_l2_is_the_gradient_of_the_distance_of_the_weights_that_the_model_computes_with(adapter: bool) -> None:
    model = adapted(gpt()) if adapter else gpt()
    start, callback = merged(model), L2ToStart(0.7)
    callback.on_train_begin(None, None, None, model=model)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    distance = sum(float((now - start[name]).pow(2).sum()) for name, now in merged(model).items()) ** 0.5
    # by autograd, of s * B A made in full
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if adapter:
        total = torch.zeros((), dtype=torch.float64)
        for name, a in trained.items():
            if "lora_A" in name:
                matrix = name.replace("base_model.model.", "").replace(".lora_A.default", "")
                base = dict(gpt().named_parameters())[matrix]
                total = (
                    total
                    + (3.0 * (trained[name.replace("lora_A", "lora_B")] @ a).T + base - start[matrix]).pow(2).sum()
                )
    else:
        total = sum((p - start[name]).pow(2).sum() for name, p in trained.items())
    expected = torch.autograd.grad(0.35 * total, list(trained.values()))
    for p in trained.values():
        p.grad = torch.ones_like(p)
    callback.on_pre_optimizer_step(None, None, None)
    for p, gradient in zip(trained.values(), expected, strict=True):
        # the products are made in float32
        assert torch.allclose(p.grad, 1 + gradient, atol=2e-5 if adapter else 1e-12)
    logs = {"loss": 1.0}
    callback.on_log(None, None, None, logs=logs)
    assert logs["regularization/distance"] == pytest.approx(distance, rel=1e-4)


def test_l2_at_the_start_changes_nothing(tmp_path: Path) -> None:
    model = gpt()
    plain = Trainer(copy.deepcopy(model), TrainingArguments(**settings(tmp_path, max_steps=1)), train_dataset=rows())
    held = Trainer(
        model, TrainingArguments(**settings(tmp_path, max_steps=1)), train_dataset=rows(), callbacks=[L2ToStart(5.0)]
    )
    plain.train()
    held.train()
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), held.model.parameters(), strict=True))


def test_l2_refuses_an_adapter_that_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="DoRA"):
        L2ToStart(1.0).on_train_begin(None, None, None, model=adapted(gpt(), use_dora=True))


class Weights(TrainerCallback):
    """One parameter after every step, before anything else reads it; and what a checkpoint would hold."""

    def __init__(self, model: Any) -> None:
        self.parameter = model.transformer.h[0].attn.c_attn.weight
        self.after: list[torch.Tensor] = []
        self.saved: list[torch.Tensor] = []
        self.evaluated: list[torch.Tensor] = []

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.after.append(self.parameter.detach().clone())

    def on_save(self, *_: Any, **__: Any) -> None:
        self.saved.append(self.parameter.detach().clone())

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.evaluated.append(self.parameter.detach().clone())


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_average_is_evaluated_saved_and_left_while_training_goes_on_with_the_weights(
    tmp_path: Path, strategy: str
) -> None:
    model = gpt().float()
    start = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    plain_model = copy.deepcopy(model)
    changes = {"save_strategy": strategy, "eval_strategy": strategy, "save_steps": 1, "eval_steps": 1, "max_steps": 6}
    plain_seen, seen = Weights(plain_model), Weights(model)
    for trained, callbacks in ((plain_model, [plain_seen]), (model, [seen, WeightAverage(0.8)])):
        args = TrainingArguments(**settings(tmp_path / str(len(callbacks)), **changes))
        Trainer(trained, args, train_dataset=rows(), eval_dataset=rows(), callbacks=callbacks).train()
    assert all(torch.equal(p, q) for p, q in zip(seen.after, plain_seen.after, strict=True))
    average, expected = start, []
    for weights in plain_seen.after:
        average = 0.8 * average + 0.2 * weights
        expected.append(average)
    at = range(6) if strategy == "steps" else [5]  # 12 rows, 2 a step: one epoch
    assert len(seen.saved) == len(seen.evaluated) == len(list(at))
    for n, saved, evaluated in zip(at, seen.saved, seen.evaluated, strict=True):
        assert torch.allclose(saved, expected[n], atol=1e-7)
        assert torch.equal(saved, evaluated)
    assert torch.allclose(model.transformer.h[0].attn.c_attn.weight, expected[-1], atol=1e-7)
    assert not torch.allclose(expected[-1], plain_seen.after[-1], atol=1e-4)


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


@pytest.mark.model
@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "whole model"])
@pytest.mark.parametrize("tokens", ["answer", "prompt", "all"])
def test_kl_to_the_start_is_that_of_an_independent_reference(
    tmp_path: Path, tokenizer: Any, adapter: bool, tokens: str
) -> None:
    from trl import SFTConfig, SFTTrainer

    from ballast.pipeline.training.start_kl import StartModelKL

    class Held(StartModelKL, SFTTrainer):
        pass

    start = llama()
    data = Dataset.from_list(
        [
            {"input_ids": list(range(3, 3 + n)), "completion_mask": [0] * 3 + [1] * (n - 3)}
            for n in (9, 6, 8, 7)
        ]
    )  # fmt: skip
    peft = {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")} if adapter else {}
    args = SFTConfig(**settings(tmp_path, max_length=32, completion_only_loss=True))
    trainer = Held(
        copy.deepcopy(start),
        args,
        train_dataset=data,
        processing_class=tokenizer,
        start_kl_weight=0.5,
        start_kl_tokens=tokens,
        **peft,
    )
    batch = trainer.data_collator(
        [{k: v for k, v in row.items() if k != "completion_mask"} for row in trainer.train_dataset]
    )
    with torch.no_grad():
        at_start = trainer.compute_loss(trainer.model, dict(batch))
        plain = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch))
    assert at_start.item() == pytest.approx(plain.item(), abs=1e-6)  # no distance yet
    torch.manual_seed(5)
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(trainer.compute_loss(trainer.model, dict(batch)), trained)
    plain_loss = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch))
    read = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    log_p = torch.log_softmax(trainer.model(**read).logits[:, :-1].double(), -1)
    with torch.no_grad():
        log_q = torch.log_softmax(start(**read).logits[:, :-1].double(), -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    answer, there = batch["labels"][:, 1:] != -100, batch["attention_mask"][:, 1:].bool()
    chosen = {"answer": answer, "prompt": there & ~answer, "all": there}[tokens]
    expected = torch.autograd.grad(plain_loss + 0.5 * kl[chosen].sum() / answer.sum(), trained)
    for name, one, other in zip(names, found, expected, strict=True):
        assert torch.allclose(one, other, atol=2e-6, rtol=1e-4), name


@pytest.mark.model
@pytest.mark.parametrize("name", ["packing", "eval_packing", "padding_free"])
def test_the_kl_to_the_start_is_refused_rows_that_share_a_sequence(tmp_path: Path, tokenizer: Any, name: str) -> None:
    from trl import SFTConfig, SFTTrainer

    from ballast.pipeline.training.start_kl import StartModelKL

    class Held(StartModelKL, SFTTrainer):
        pass

    data = Dataset.from_list([{"input_ids": list(range(3, 3 + n))} for n in (9, 6)])
    length = None if name == "padding_free" else 32  # TRL cuts no row of a sequence without padding
    args = SFTConfig(**settings(tmp_path, max_length=length, **{name: True}))
    with pytest.raises(ConfigError, match=f"with {name}"):
        Held(llama(), args, train_dataset=data, processing_class=tokenizer, start_kl_weight=0.5)
