"""SafeGrad inside real trainers, against the same formula in float64: what reaches the optimizer, and what does not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.pipeline.training import safegrad_reference as reference
from trl import SFTConfig, SFTTrainer

from ballast import SafeGrad
from ballast.errors import BallastError, ConfigError
from ballast.pipeline.training.safegrad import modes

pytestmark = pytest.mark.model

TASK, SAFE = reference.rows(reference.TASK_LENGTHS, 0), reference.rows(reference.SAFE_LENGTHS, 1)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> Any:
    return reference.small_model()


def arguments(folder: Path, **changes: Any) -> SFTConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 2e-2, "bf16": False,
        "report_to": "none", "save_strategy": "no", "logging_steps": 1, "max_length": 32, "disable_tqdm": True,
        "gradient_checkpointing": False, "use_cpu": True, "seed": 3, "completion_only_loss": True,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.25, "weight_decay": 0.1,
    }  # fmt: skip
    return SFTConfig(**(settings | changes))


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes))


def moved(model: Any) -> Any:
    """The model with weights that are no longer those it was made with."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters(model):
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def trained(folder: Path, model: Any, tokenizer: Any, *safegrad: Any, **changes: Any) -> tuple[Any, Any, Any]:
    """The trainer after training, what stood before SafeGrad, and what reached the optimizer."""
    before, after = reference.Watcher(), reference.Watcher()
    args = arguments(folder, **changes)
    callbacks = [before, *safegrad, after]
    trainer = SFTTrainer(model, args, train_dataset=TASK, processing_class=tokenizer, callbacks=callbacks)
    trainer.train()
    return trainer, before, after


def logged(trainer: Any, name: str) -> list[float]:
    return [row[f"safegrad/{name}"] for row in trainer.state.log_history if f"safegrad/{name}" in row]


def as_vector(gradients: dict[str, Any], model: Any) -> torch.Tensor:
    return reference.vector(list(gradients.values()), model)


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_reaches_the_optimizer_is_the_formula(
    tmp_path: Path, model: Any, tokenizer: Any, accumulation: int, adapter: bool
) -> None:
    model = get_peft_model(model, lora()) if adapter else model
    pristine = copy.deepcopy(model)
    _, before, after = trained(
        tmp_path, model, tokenizer, SafeGrad(SAFE, rho=0.7, batch_size=4),
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    start, conflicts = reference.in_float64(pristine, before.weights[0]), 0
    for step, weights in enumerate(before.weights):
        exact = reference.in_float64(pristine, weights)
        u = reference.task_gradient(exact, list(TASK))
        a, _ = reference.kl_gradient(exact, start, list(SAFE))
        conflicts += bool(u @ a < 0)
        assert largest(as_vector(after.gradients[step], exact) - reference.combined(u, a, 0.7, 0.25)) < 1e-6
    assert conflicts >= 1


def test_before_the_first_update_nothing_changes(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    for options in ({}, {"bf16": True}):
        own = get_peft_model(copy.deepcopy(model), lora())
        trainer, before, after = trained(tmp_path, own, tokenizer, SafeGrad(SAFE), max_steps=2, **options)
        for name, gradient in before.gradients[0].items():
            assert torch.equal(gradient, after.gradients[0][name])
        assert logged(trainer, "alignment_kl")[0] == 0
        assert logged(trainer, "applied_rate") == [0, 1]


def test_without_projection_and_weight_training_is_the_same_to_the_last_bit(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    # LoRA dropout draws random numbers in every step: SafeGrad must use up none of them.
    model = get_peft_model(model, lora(lora_dropout=0.3))
    other = copy.deepcopy(model)
    trained(tmp_path, model, tokenizer)
    trained(tmp_path, other, tokenizer, SafeGrad(SAFE, rho=0, projection="none", batch_size=2))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("project", [True, False])
def test_rho_and_projection_are_switches_of_their_own(
    tmp_path: Path, model: Any, tokenizer: Any, project: bool
) -> None:
    pristine = copy.deepcopy(model)
    safegrad = SafeGrad(SAFE, rho=0 if project else 2.0, projection="global" if project else "none", batch_size=4)
    _, before, after = trained(tmp_path, model, tokenizer, safegrad)
    start = reference.in_float64(pristine, before.weights[0])
    exact = reference.in_float64(pristine, before.weights[2])
    u = as_vector(before.gradients[2], exact)
    a, _ = reference.kl_gradient(exact, start, list(SAFE))
    assert u @ a < 0
    found = as_vector(after.gradients[2], exact)
    assert largest(found - reference.combined(u, a, 0 if project else 2.0, 0.25, project)) < 1e-6
    if project:
        assert found @ a >= -1e-6 * found.norm() * a.norm()


def test_between_safety_gradients_the_last_one_is_used_again(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    pristine = copy.deepcopy(model)
    safegrad = SafeGrad(SAFE, every_n_steps=3, batch_size=4)
    trainer, before, after = trained(tmp_path, moved(model), tokenizer, safegrad, max_steps=5)
    start = reference.in_float64(pristine, before.weights[0])
    kls = []
    # At step 0 the gradient is exactly 0 and is not kept: step 1 asks again, and 2 uses what 1 was given; 3 asks, 4 uses it.
    for asked, used in ((1, 2), (3, 4)):
        exact = reference.in_float64(pristine, before.weights[asked])
        a, kl = reference.kl_gradient(exact, start, list(SAFE))
        kls.append(pytest.approx(kl, rel=1e-4))
        for step in (asked, used):
            u = as_vector(before.gradients[step], exact)
            assert largest(as_vector(after.gradients[step], exact) - reference.combined(u, a, 1.0, 0.25)) < 1e-6
    assert logged(trainer, "alignment_kl") == [0, *kls]
    assert logged(trainer, "applied_rate") == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_the_task_changes_nothing(
    tmp_path: Path, model: Any, tokenizer: Any, reentrant: bool
) -> None:
    plain, checkpointed = (get_peft_model(copy.deepcopy(model), lora()) for _ in range(2))
    checkpointed.load_state_dict(plain.state_dict())
    _, _, first = trained(tmp_path, plain, tokenizer, SafeGrad(SAFE))
    _, _, second = trained(
        tmp_path, checkpointed, tokenizer, SafeGrad(SAFE), gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    for name, gradient in first.gradients[2].items():
        assert torch.allclose(gradient, second.gradients[2][name], atol=1e-6), name


def test_under_bf16_autocast_the_safety_gradient_is_right_within_its_precision(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    pristine = copy.deepcopy(model)
    safegrad = SafeGrad(SAFE, rho=1.0, projection="none", batch_size=4)
    _, before, after = trained(tmp_path, model, tokenizer, safegrad, bf16=True, max_grad_norm=0)
    start = reference.in_float64(pristine, before.weights[0])
    exact = reference.in_float64(pristine, before.weights[2])
    a, _ = reference.kl_gradient(exact, start, list(SAFE))
    added = as_vector(after.gradients[2], exact) - as_vector(before.gradients[2], exact)
    assert added @ a > 0.99 * added.norm() * a.norm()
    assert (added - a).norm() < 0.1 * a.norm()


def test_the_adam_metric_makes_the_preconditioned_update_orthogonal(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    pristine = copy.deepcopy(model)
    squares: list[dict[str, torch.Tensor]] = []

    class Moments(reference.Watcher):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found = kwargs["optimizer"].state
            named = kwargs["model"].named_parameters()
            squares.append({n: found[p]["exp_avg_sq"].clone() for n, p in named if p in found})

    safegrad = SafeGrad(SAFE, rho=0, metric="adam", batch_size=4)
    _, before, after = trained(tmp_path, model, tokenizer, Moments(), safegrad)
    start = reference.in_float64(pristine, before.weights[0])
    exact = reference.in_float64(pristine, before.weights[2])
    u = as_vector(before.gradients[2], exact)
    a, _ = reference.kl_gradient(exact, start, list(SAFE))
    # two updates were made: bias correction 1 - .999^2; AdamW divides by sqrt(v) + eps
    divisor = (as_vector(squares[2], exact) / (1 - 0.999**2)).sqrt() + 1e-8
    assert u @ (a / divisor) < 0
    wanted = reference.clipped(u - (u @ (a / divisor)) / (a @ (a / divisor)) * a, 0.25)
    found = as_vector(after.gradients[2], exact)
    assert largest(found - wanted) < 1e-6
    assert abs((found / divisor) @ a) < 1e-4 * (found / divisor).norm() * a.norm()


def test_an_optimizer_without_mean_squares_is_refused_the_adam_metric(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match="exp_avg_sq"):
        trained(tmp_path, model, tokenizer, SafeGrad(SAFE, metric="adam"), optim="adafactor")


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", ["full", "new adapter", "learnt adapter"])
def test_the_reference_is_the_policy_as_it_was_given(
    tmp_path: Path, model: Any, tokenizer: Any, cache: bool, kind: str
) -> None:
    if kind != "full":
        model = get_peft_model(model, lora())
    if kind == "learnt adapter":
        model = moved(model)  # switched off, it would be another model than training starts from
    pristine = copy.deepcopy(model)
    safegrad = SafeGrad(SAFE, cache_reference=cache, batch_size=4)
    trainer, before, _ = trained(tmp_path, model, tokenizer, safegrad)
    start = reference.in_float64(pristine, before.weights[0])
    _, kl = reference.kl_gradient(reference.in_float64(pristine, before.weights[2]), start, list(SAFE))
    assert logged(trainer, "alignment_kl") == [
        pytest.approx(0, abs=1e-7),
        pytest.approx(logged(trainer, "alignment_kl")[1]),
        pytest.approx(kl, rel=1e-4),
    ]


def test_a_given_reference_takes_the_place_of_the_start_model(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    aligned = copy.deepcopy(model)
    start = moved(model)
    exact = reference.in_float64(copy.deepcopy(start), dict(start.named_parameters()))
    _, kl = reference.kl_gradient(exact, copy.deepcopy(aligned).double(), list(SAFE))
    safegrad = SafeGrad(SAFE, reference=aligned, batch_size=4)
    trainer, _, _ = trained(tmp_path, start, tokenizer, safegrad, max_steps=1)
    assert logged(trainer, "alignment_kl") == [pytest.approx(kl, rel=1e-4)]


def test_a_resumed_training_keeps_the_reference_of_its_start(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    model = get_peft_model(model, lora())
    again = copy.deepcopy(model)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, _, _ = trained(tmp_path, model, tokenizer, SafeGrad(SAFE, batch_size=2), **options)
    trainer = SFTTrainer(
        again, arguments(tmp_path, **options), train_dataset=TASK, processing_class=tokenizer,
        callbacks=[SafeGrad(SAFE, batch_size=2)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(trainer, "alignment_kl")[-2:] == pytest.approx(logged(whole, "alignment_kl")[-2:], rel=1e-5)
    late = SFTTrainer(again, arguments(tmp_path, **options), train_dataset=TASK, processing_class=tokenizer)
    late.add_callback(SafeGrad(SAFE))
    with pytest.raises(ConfigError, match="resumed at step 2"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_added_to_a_trainer_that_is_there_it_works_too(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    trainer = SFTTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=TASK, processing_class=tokenizer)
    trainer.add_callback(SafeGrad(SAFE))
    trainer.train()
    assert logged(trainer, "applied_rate") == [0, 1]


def nan_at(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The safety gradient of these calls, counted from 0, is no number in one place."""
    calls = []
    original = modes.safety_gradient

    def broken(*args: Any) -> Any:
        found = original(*args)
        if len(calls) in steps:
            next(part for part in found.parts if part is not None).view(-1)[0] = float("nan")
        calls.append(1)
        return found

    monkeypatch.setattr(modes, "safety_gradient", broken)


def test_a_safety_gradient_that_is_no_number_skips_the_update_and_is_counted(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {1})
    trainer, before, after = trained(tmp_path, model, tokenizer, SafeGrad(SAFE))
    assert all(gradient is None for gradient in after.gradients[1].values())
    for name, weight in before.weights[1].items():
        assert torch.equal(weight, before.weights[2][name]), name  # weight decay 0.1 did not act either
    assert not torch.equal(before.weights[0]["lm_head.weight"], before.weights[1]["lm_head.weight"])
    assert logged(trainer, "skipped") == [0, 1, 1]


def test_more_skipped_updates_than_allowed_stop_the_run(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {0, 1, 2})
    with pytest.raises(BallastError, match="at step 1: 2 updates were skipped"):
        trained(tmp_path, model, tokenizer, SafeGrad(SAFE, max_skipped=1))


def test_figures_are_in_the_history_and_reach_later_callbacks(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    seen: list[dict[str, Any]] = []

    class Later(reference.Watcher):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer, _, _ = trained(tmp_path, model, tokenizer, SafeGrad(SAFE, log_layers=True), Later(), logging_steps=3)
    row = trainer.state.log_history[0]
    assert {f"safegrad/{n}" for n in ("alignment_kl", "cosine", "conflict_rate", "removed_norm_share")} <= set(row)
    assert {"safegrad/cosine_layer_0", "safegrad/cosine_layer_1"} <= set(row)
    assert row["safegrad/applied_rate"] == pytest.approx(2 / 3)
    assert row["safegrad/cosine"] == seen[0]["safegrad/cosine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "guard"}, "mode='guard'"),
        ({"projection": "layer"}, "projection='layer'"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"rho": float("nan")}, "rho=nan"),
        ({"rho": float("inf")}, "rho=inf"),
        ({"max_step": -1.0}, r"max_step=-1\.0"),
        ({"max_step": 0.0}, r"max_step=0\.0"),
        ({"tolerance": -5.0}, r"tolerance=-5\.0"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"budget": -0.1}, r"budget=-0\.1"),
        ({"margin": float("nan")}, "margin=nan"),
        ({"max_length": 0}, "max_length=0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SafeGrad(SAFE, **options)
