"""ShapedSFTTrainer on a tiny random model: its losses, its gradients, its reference, and TRL's where shaping is off."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from ballast import ShapedSFTTrainer
from ballast.errors import ConfigError, DataError
from ballast.pipeline.config_sft import ConstrainedLoss, CorrectedLoss, FaithfulLoss, PlainLoss, RejectLoss
from ballast.pipeline.training import sft
from ballast.pipeline.training.logged_means import means_over_processes
from ballast.pipeline.training.reference import REFERENCE_COLUMN

pytestmark = pytest.mark.model

PROMPT = 3
LENGTHS = (9, 6, 12, 7)


def arguments(folder: Path, **changes: Any) -> SFTConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "bf16": False,
        "gradient_accumulation_steps": 2, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "max_length": 32,
        "disable_tqdm": True, "gradient_checkpointing": False, "use_cpu": True, "seed": 3, "completion_only_loss": True,
    }  # fmt: skip
    return SFTConfig(**(settings | changes))


def dataset(star: Any = lambda row, t: 1.0) -> Dataset:
    """Rows of random tokens; `star(row, t)` is the STAR of answer token t, counted from 0."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n, length in enumerate(LENGTHS):
        answer = length - PROMPT
        rows.append(
            {
                "input_ids": torch.randint(3, 200, (length,), generator=generator).tolist(),
                "completion_mask": [0] * PROMPT + [1] * answer,
                "star": [1.0] * PROMPT + [float(star(n, t)) for t in range(answer)],
            }
        )
    return Dataset.from_list(rows)


def varied(row: int, t: int) -> float:
    """Row 0 is wholly safe; the others fall."""
    return 1.0 if row == 0 else max(0.0, 1.0 - 0.15 * row - 0.2 * t)


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def shaped(folder: Path, model: Any, tokenizer: Any, loss: Any, rows: Dataset, **options: Any) -> ShapedSFTTrainer:
    args = arguments(folder, **options.pop("args", {}))
    return ShapedSFTTrainer(model, args, rows, loss=loss, processing_class=tokenizer, **options)


def moved(model: Any) -> Any:
    """The model with weights that are no longer those of its reference."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_" in name or "mlp" in name):
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def one_batch(trainer: ShapedSFTTrainer) -> dict[str, torch.Tensor]:
    """All rows, in order, as a batch."""
    keep = {"input_ids", "labels", *trainer._columns}
    return trainer.data_collator([{k: v for k, v in row.items() if k in keep} for row in trainer.train_dataset])


def dense_log_probs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T - 1, V) from full logits: nothing of TRL's head or of our chunks."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1)


def independent_loss(model: Any, reference: Any, batch: dict[str, torch.Tensor], kl: str, lam: float) -> torch.Tensor:
    """Eq. 3 written once more, token by token in a loop."""
    log_p, total = dense_log_probs(model, batch), torch.zeros(())
    with torch.no_grad():
        log_q = dense_log_probs(reference, batch)
    count = 0
    for b, row in enumerate(batch["labels"].tolist()):
        for t in range(1, len(row)):
            if row[t] == -100:
                continue
            count += 1
            p, q, s = log_p[b, t - 1], log_q[b, t - 1], batch["star"][b, t].item()
            held = 0.5 * (p[row[t]] - q[row[t]]) ** 2 if kl == "k2" else (p.exp() * (p - q)).sum()
            total = total - s * p[row[t]] + lam * (1 - s) * held
    return total / count


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize(
    "loss", [PlainLoss(), FaithfulLoss(), CorrectedLoss(), RejectLoss()], ids=lambda loss: loss.type
)
def test_shaping_off_equals_trl_bit_for_bit(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, loss: Any, adapter: bool
) -> None:
    import copy

    start, rows = copy.deepcopy(tiny_model), dataset()
    peft = {"peft_config": lora()} if adapter else {}
    torch.manual_seed(1)
    plain = SFTTrainer(tiny_model, arguments(tmp_path), train_dataset=rows, processing_class=tokenizer, **peft)
    plain.train()
    torch.manual_seed(1)
    ours = shaped(tmp_path, start, tokenizer, loss, rows, **peft)
    ours.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, ours)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    weights = ours.model.state_dict()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize(
    ("loss", "kl"),
    [
        (FaithfulLoss(), "k2"),
        (FaithfulLoss(cache_reference=False), "k2"),
        (CorrectedLoss(benign_floor=1.0, chunk_tokens=2), "exact"),
    ],
    ids=["k2-cached", "k2-live", "exact"],
)
def test_loss_and_gradient_are_those_of_an_independent_implementation(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, loss: Any, kl: str, adapter: bool
) -> None:
    import copy

    reference = copy.deepcopy(tiny_model)
    trainer = shaped(
        tmp_path, tiny_model, tokenizer, loss, dataset(varied), **({"peft_config": lora()} if adapter else {})
    )
    model = moved(trainer.model)
    batch = one_batch(trainer)
    expected = independent_loss(model, reference, batch, kl, 0.5)
    expected.backward()
    theirs = gradients(model)
    model.zero_grad()
    ours = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(sum(LENGTHS) - PROMPT * 4))
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    ours.backward()
    mine = gradients(model)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(mine[name], value, atol=2e-6), name
    assert any(value.abs().max() > 1e-3 for value in mine.values())


def test_the_exact_kl_is_held_from_the_floor_on_and_not_above(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    # STAR .95 and .85 with a floor of .9: the first counts as 1, the second as it is.
    trainer = shaped(
        tmp_path, tiny_model, tokenizer, CorrectedLoss(kl_weight=0.0), dataset(lambda row, t: 0.95 if row < 2 else 0.85)
    )
    batch = one_batch(trainer)
    log_p = dense_log_probs(trainer.model, batch)
    ce = [
        -log_p[b, t - 1, label].item()
        for b, row in enumerate(batch["labels"].tolist())
        for t, label in enumerate(row)
        if label != -100
    ]
    answers = [length - PROMPT for length in LENGTHS]
    safe = sum(answers[:2])
    expected = (sum(ce[:safe]) + 0.85 * sum(ce[safe:])) / len(ce)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected, abs=1e-6)


def test_a_rejected_answer_teaches_nothing_and_still_counts_in_the_normaliser(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    trainer = shaped(tmp_path, tiny_model, tokenizer, RejectLoss(), dataset(lambda row, t: float(row != 2)))
    batch = one_batch(trainer)
    log_p = dense_log_probs(trainer.model, batch)
    ce = [
        [-log_p[b, t - 1, label].item() for t, label in enumerate(row) if label != -100]
        for b, row in enumerate(batch["labels"].tolist())
    ]
    # answers of 6, 3, 9 and 4 tokens; the third, of 9, weighs 0, and 22 tokens divide
    expected = (sum(ce[0]) + sum(ce[1]) + sum(ce[3])) / 22
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected, abs=1e-6)


def test_rejection_refuses_weights_that_are_no_verdict(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    trainer = shaped(tmp_path, tiny_model, tokenizer, RejectLoss(), dataset(varied))
    with pytest.raises(DataError, match="verdict of 0 or 1"):
        trainer.compute_loss(trainer.model, one_batch(trainer))


@pytest.mark.parametrize("cached", [True, False])
def test_constrained_sft_has_the_gradient_of_its_published_objective(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, cached: bool
) -> None:
    import copy

    reference = copy.deepcopy(tiny_model)
    rows = dataset().remove_columns("star")  # it asks no guard
    trainer = shaped(tmp_path, tiny_model, tokenizer, ConstrainedLoss(cache_reference=cached), rows, peft_config=lora())
    model, batch = moved(trainer.model), one_batch(trainer)
    log_p = dense_log_probs(model, batch)
    with torch.no_grad():
        log_q = dense_log_probs(reference, batch)
    objective = torch.zeros(())
    for b, row in enumerate(batch["labels"].tolist()):
        for t in range(PROMPT, LENGTHS[b]):
            place = t - PROMPT + 1
            beta = 0.5 if place == 1 else 2.0 if place <= 5 else 0.1
            gap = log_p[b, t - 1, row[t]] - log_q[b, t - 1, row[t]]
            objective = objective - 2 / beta * torch.nn.functional.logsigmoid(beta * gap)
    (objective / 22).backward()
    theirs = gradients(model)
    model.zero_grad()
    trainer.compute_loss(model, dict(batch)).backward()
    for name, value in gradients(model).items():
        assert torch.allclose(value, theirs[name], atol=2e-6), name


def test_only_rows_with_unsafe_text_are_run_through_the_reference(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    original = sft.Reference.hidden

    def spy(self: Any, inputs: dict[str, torch.Tensor]) -> Any:
        seen.append(tuple(inputs["input_ids"].shape))
        return original(self, inputs)

    monkeypatch.setattr(sft.Reference, "hidden", spy)
    safe = shaped(tmp_path, tiny_model, tokenizer, CorrectedLoss(), dataset(), peft_config=lora())
    safe.compute_loss(safe.model, one_batch(safe))
    assert seen == []
    # Row 1 alone has an unsafe token, the second of its answer: label position 4, so 5 positions are run.
    some = shaped(
        tmp_path, safe.model, tokenizer, CorrectedLoss(), dataset(lambda row, t: 0.2 if (row, t) == (1, 1) else 1.0)
    )
    some.compute_loss(some.model, one_batch(some))
    assert seen == [(1, 5)]


def test_cached_log_probs_are_those_of_the_policy_before_training(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    done: list[int] = []
    trainer = shaped(
        tmp_path, tiny_model, tokenizer, FaithfulLoss(), dataset(varied), peft_config=lora(), progress=done.append
    )
    assert sum(done) == len(LENGTHS)
    rows = trainer.train_dataset
    assert rows[0][REFERENCE_COLUMN] == [0.0] * LENGTHS[0]  # wholly safe: read by nothing
    batch = one_batch(trainer)
    log_p = dense_log_probs(trainer.model, batch)
    for b in range(1, 4):
        for t in range(PROMPT, LENGTHS[b]):
            expected = log_p[b, t - 1, batch["labels"][b, t]].item()
            assert rows[b][REFERENCE_COLUMN][t] == pytest.approx(expected, abs=1e-5)
        assert rows[b][REFERENCE_COLUMN][:PROMPT] == [0.0] * PROMPT


def test_an_adapter_that_has_learnt_already_is_not_switched_off(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    # Off, it would give the base below it; the policy that training starts from has the adapter on.
    trained = moved(get_peft_model(tiny_model, lora()))
    trainer = shaped(tmp_path, trained, tokenizer, CorrectedLoss(), dataset(varied))
    assert trainer.reference is not None
    assert not trainer.reference.adapter_off
    assert trainer.reference.model is not trainer.model
    trainer.compute_loss(trainer.model, one_batch(trainer))
    assert means_over_processes(trainer._sums["train"])["sft/kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_new_adapter_is_switched_off_and_back_on(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    trainer = shaped(tmp_path, tiny_model, tokenizer, CorrectedLoss(), dataset(varied), peft_config=lora())
    assert trainer.reference is not None
    assert trainer.reference.adapter_off
    model = moved(trainer.model).train()
    before = dense_log_probs(model, one_batch(trainer))
    trainer.compute_loss(model, one_batch(trainer))
    assert means_over_processes(trainer._sums["train"])["sft/kl"] > 1e-4
    assert model.training
    assert torch.equal(dense_log_probs(model, one_batch(trainer)), before)


@pytest.mark.parametrize("loss", [FaithfulLoss(), CorrectedLoss()], ids=lambda loss: loss.type)
def test_the_reference_is_computed_in_the_precision_of_training(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, loss: Any
) -> None:
    # Before the first update policy and reference are one; a reference in fp32 beside a policy in bf16 would differ.
    trainer = shaped(
        tmp_path, tiny_model, tokenizer, loss, dataset(varied), peft_config=lora(), args={"bf16": True, "max_steps": 1}
    )
    trainer.train()
    assert trainer.state.log_history[0]["sft/kl"] == pytest.approx(0.0, abs=1e-7)


def test_an_adapter_that_begins_as_a_change_is_refused_as_its_own_reference(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    changed = lora()
    changed.init_lora_weights = False  # random B
    with pytest.raises(ConfigError, match="init_lora_weights"):
        shaped(tmp_path, tiny_model, tokenizer, CorrectedLoss(), dataset(varied), peft_config=changed)


def test_a_model_that_changes_its_logits_after_the_head_is_refused_the_exact_kl(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    tiny_model.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping = 30"):
        shaped(tmp_path, tiny_model, tokenizer, CorrectedLoss(), dataset(varied), peft_config=lora())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("packing", True),
        ("eval_packing", True),
        ("padding_free", True),
        ("loss_type", "dft"),
        ("label_smoothing_factor", 0.1),
    ],
)
def test_what_loses_the_weights_is_refused_by_name(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, option: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=option):
        shaped(tmp_path, tiny_model, tokenizer, CorrectedLoss(), dataset(), args={option: value})


def test_a_data_set_without_the_column_is_refused_before_training(
    tmp_path: Path, tiny_model: Any, tokenizer: Any
) -> None:
    with pytest.raises(DataError, match="no column 'star'"):
        shaped(tmp_path, tiny_model, tokenizer, FaithfulLoss(), dataset().remove_columns("star"))


def test_a_batch_without_a_weight_for_every_token_raises(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    trainer = shaped(tmp_path, tiny_model, tokenizer, CorrectedLoss(), dataset(varied))
    with pytest.raises(DataError, match="no column 'star'"):
        trainer.data_collator([{"input_ids": [5, 6], "labels": [-100, 6]}])
    with pytest.raises(DataError, match="3 values in 'star' for 2 tokens"):
        trainer.data_collator([{"input_ids": [5, 6], "labels": [-100, 6], "star": [1.0, 1.0, 0.5]}])
    for wrong in (float("nan"), 1.5, -0.1):
        with pytest.raises(DataError, match="no number in"):
            trainer.data_collator([{"input_ids": [5, 6], "labels": [-100, 6], "star": [1.0, wrong]}])


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_rows_longer_than_max_length_lose_tokens_and_weights_at_the_same_place(
    tmp_path: Path, tiny_model: Any, tokenizer: Any, mode: str
) -> None:
    # The STAR of a token says where it stood: .00, .01, .02 ...
    rows = dataset(lambda row, t: t / 100)
    trainer = shaped(
        tmp_path, tiny_model, tokenizer, FaithfulLoss(), rows, args={"max_length": 7, "truncation_mode": mode}
    )
    for row, before in zip(trainer.train_dataset, rows, strict=True):
        kept = slice(None, 7) if mode == "keep_start" else slice(-7, None)
        assert row["input_ids"] == before["input_ids"][kept]
        assert row["star"] == before["star"][kept]
        assert len(row["labels"]) == len(row["star"])


def test_evaluation_has_the_shaped_loss_too(tmp_path: Path, tiny_model: Any, tokenizer: Any) -> None:
    trainer = shaped(
        tmp_path, tiny_model, tokenizer, FaithfulLoss(kl_weight=0.0), dataset(varied), eval_dataset=dataset(varied),
        args={"per_device_eval_batch_size": 4},
    )  # fmt: skip
    batch = one_batch(trainer)
    expected = independent_loss(trainer.model, trainer.model, batch, "k2", 0.0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
