"""The trust region and the watchdog: what becomes of the weights after an update."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.training import safegrad_reference as reference
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from ballast import SafeGrad
from ballast.errors import BallastError, ConfigError
from ballast.pipeline.training.safegrad import modes

TASK, SAFE = reference.rows(reference.TASK_LENGTHS, 0), reference.rows(reference.SAFE_LENGTHS, 1)
RATE = 0.5


class After(reference.Watcher):
    """The weights after the update, as they are at its place among the callbacks."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to keep before."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})


class Padding:
    """Task rows as `transformers.Trainer` takes them."""

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
        mask = torch.tensor([row["completion_mask"] + [0] * (width - len(row["input_ids"])) for row in rows]).bool()
        attention = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
        return {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(~mask, -100)}


def trained(
    folder: Path, safegrad: Any, steps: int = 2, first: Sequence[Any] = (), **changes: Any
) -> tuple[Any, Any, Any, Any]:
    """The pristine model, the trainer after training with plain SGD, and weights before and after SafeGrad acted."""
    model = reference.small_model()
    pristine = copy.deepcopy(model)
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": RATE, "optim": "sgd",
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
        "lr_scheduler_type": "constant", "max_grad_norm": 0, "remove_unused_columns": False,
    }  # fmt: skip
    before, after = After(), After()
    trainer = Trainer(
        model, TrainingArguments(**(settings | changes)), train_dataset=TASK, data_collator=Padding(), callbacks=[*first, before, safegrad, after]
    )  # fmt: skip
    trainer.train()
    return pristine, trainer, before.weights, after.weights


def logged(trainer: Any, name: str) -> list[float]:
    return [row[f"safegrad/{name}"] for row in trainer.state.log_history if f"safegrad/{name}" in row]


def whole(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([w.double().reshape(-1) for w in weights.values()])


def ce(pristine: Any, weights: dict[str, torch.Tensor]) -> float:
    return float(reference.task_loss(reference.in_float64(pristine, weights), list(SAFE)))


@pytest.mark.parametrize("max_step", [None, 1e6], ids=["learning rate", "to the border"])
def test_the_trust_region_steps_back_by_the_formula(tmp_path: Path, max_step: float | None) -> None:
    pristine, trainer, before, after = trained(
        tmp_path, SafeGrad(SAFE, mode="trust_region", batch_size=4, max_step=max_step, margin=-0.5)
    )
    start = ce(pristine, dict(pristine.named_parameters()))
    for step in range(2):
        exact = reference.in_float64(pristine, before[step])
        excess = ce(pristine, before[step]) - (start - 0.5)
        assert excess > 0
        a = reference.task_gradient(exact, list(SAFE))
        length = min(excess / float(a @ a), RATE if max_step is None else max_step)
        assert (whole(after[step]) - (whole(before[step]) - length * a)).abs().max() < 1e-5
        assert logged(trainer, "trust_excess")[step] == pytest.approx(excess, rel=1e-4)


def test_inside_the_trust_region_an_update_stands(tmp_path: Path) -> None:
    _, trainer, before, after = trained(tmp_path, SafeGrad(SAFE, mode="trust_region", batch_size=4, margin=100.0))
    assert all(torch.equal(whole(b), whole(a)) for b, a in zip(before, after, strict=True))
    assert logged(trainer, "trust_rate") == [0, 0]


def kl(pristine: Any, weights: dict[str, torch.Tensor]) -> float:
    return reference.kl_gradient(reference.in_float64(pristine, weights), copy.deepcopy(pristine).double(), list(SAFE))[
        1
    ]


def test_an_update_within_the_tolerance_stands_to_the_last_bit(tmp_path: Path) -> None:
    pristine, trainer, before, after = trained(tmp_path, SafeGrad(SAFE, mode="watchdog", batch_size=2, tolerance=10.0))
    assert all(torch.equal(whole(b), whole(a)) for b, a in zip(before, after, strict=True))
    assert logged(trainer, "watchdog_loss") == pytest.approx([kl(pristine, weights) for weights in after], rel=1e-4)
    assert logged(trainer, "watchdog_kept_share") == [1, 1]


def test_an_update_above_the_tolerance_is_halved_until_it_is_within(tmp_path: Path) -> None:
    pristine, _, before, _ = trained(tmp_path, SafeGrad(SAFE, mode="watchdog", tolerance=10.0), steps=1)
    start = dict(pristine.named_parameters())
    quarter = {n: start[n] + 0.25 * (w - start[n]) for n, w in before[0].items()}
    half = {n: start[n] + 0.5 * (w - start[n]) for n, w in before[0].items()}
    between = (kl(pristine, quarter) + kl(pristine, half)) / 2
    assert kl(pristine, quarter) < between < kl(pristine, half)
    _, trainer, _, after = trained(tmp_path, SafeGrad(SAFE, mode="watchdog", tolerance=between), steps=1)
    assert (whole(after[0]) - whole(quarter)).abs().max() < 1e-6
    assert logged(trainer, "watchdog_kept_share") == [0.25]
    assert logged(trainer, "watchdog_shortened_rate") == [1]


def test_an_update_that_no_halving_mends_is_undone_to_the_last_bit(tmp_path: Path) -> None:
    pristine, trainer, before, after = trained(
        tmp_path, SafeGrad(SAFE, mode="watchdog", tolerance=0.0, halvings=1), steps=1
    )
    assert not torch.equal(whole(before[0]), whole(after[0]))
    assert torch.equal(whole(after[0]), whole(dict(pristine.named_parameters())))
    assert logged(trainer, "watchdog_undone_rate") == [1]


def test_a_budget_holds_what_many_small_rises_would_add_up_to(tmp_path: Path) -> None:
    free = trained(tmp_path, SafeGrad(SAFE, mode="watchdog", tolerance=10.0), steps=4)
    budget = kl(free[0], free[3][1])  # of the second update: the third and fourth go beyond
    assert kl(free[0], free[3][3]) > budget
    held = trained(tmp_path, SafeGrad(SAFE, mode="watchdog", tolerance=10.0, budget=budget), steps=4)
    assert all(kl(held[0], weights) <= budget * 1.0001 for weights in held[3])


@pytest.mark.parametrize("mode", ["trust_region", "watchdog"])
def test_updates_between_checks_are_left_alone(tmp_path: Path, mode: Any) -> None:
    safegrad = SafeGrad(SAFE, mode=mode, every_n_steps=2, tolerance=0.0, margin=-1.0)
    _, _, before, after = trained(tmp_path, safegrad, steps=4)
    changed = [not torch.equal(whole(b), whole(a)) for b, a in zip(before, after, strict=True)]
    assert changed == [True, False, True, False]


def test_a_safety_loss_that_is_no_number_undoes_the_update_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = modes.mean_loss

    def broken(*args: Any) -> float:
        calls.append(1)
        # before, after of the first update; then those of the second, whose two halvings measure too
        return float("nan") if len(calls) > 3 else original(*args)

    monkeypatch.setattr(modes, "mean_loss", broken)
    safegrad = SafeGrad(SAFE, mode="watchdog", tolerance=10.0, halvings=2)
    _, trainer, before, after = trained(tmp_path, safegrad)
    assert not torch.equal(whole(before[1]), whole(after[1]))
    assert torch.equal(whole(after[1]), whole(after[0]))
    assert logged(trainer, "skipped") == [0, 1]
    calls.clear()
    with pytest.raises(BallastError, match="max_skipped is 0"):
        trained(tmp_path, SafeGrad(SAFE, mode="watchdog", tolerance=10.0, max_skipped=0))


class Poison(TrainerCallback):
    """A task gradient that is no number at the second update, as a loss that overflows leaves one."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            next(model.parameters()).grad.fill_(float("nan"))


def test_an_update_that_leaves_no_numbers_is_undone_by_the_trust_region_and_counted(tmp_path: Path) -> None:
    safegrad = SafeGrad(SAFE, mode="trust_region", batch_size=4)
    _, trainer, before, after = trained(tmp_path, safegrad, steps=3, first=[Poison()])
    assert not torch.isfinite(whole(before[1])).all()
    assert torch.equal(whole(after[1]), whole(after[0]))
    assert torch.isfinite(whole(after[2])).all()
    assert logged(trainer, "skipped") == [0, 1, 1]


@pytest.mark.parametrize("mode", ["project", "trust_region", "watchdog"])
def test_a_training_does_not_end_well_with_weights_that_are_no_numbers(tmp_path: Path, mode: Any) -> None:
    # Looked at are updates 0, 2, ...: nobody sees the second update, which is the last.
    with pytest.raises(BallastError, match="after 2 steps the trained weights are no numbers"):
        trained(tmp_path, SafeGrad(SAFE, mode=mode, every_n_steps=2, tolerance=10.0), first=[Poison()])


def test_a_second_one_in_a_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has a SafeGrad already"):
        trained(tmp_path, SafeGrad(SAFE), first=[SafeGrad(SAFE, mode="watchdog")])
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False)
    trainer = Trainer(reference.small_model(), args, train_dataset=TASK, data_collator=Padding())
    for _ in range(2):  # added later, too
        trainer.add_callback(SafeGrad(SAFE))
    with pytest.raises(ConfigError, match="has a SafeGrad already"):
        trainer.train()


def test_one_trainer_trains_twice_with_its_own(tmp_path: Path) -> None:
    _, trainer, _, _ = trained(tmp_path, SafeGrad(SAFE), steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_an_encoder_decoder_is_refused_with_the_reason_when_the_trainer_is_made(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        Trainer(T5ForConditionalGeneration(config), args, train_dataset=TASK, callbacks=[SafeGrad(SAFE)])
