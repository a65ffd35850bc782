"""SafeGrad's parts alone: its arithmetic, the alignment set, the safety loss in every form of model, and what is refused."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tests.pipeline.training import safegrad_reference as reference

from ballast.errors import ConfigError, DataError
from ballast.pipeline.training.safegrad import projection, safety_loss, support
from ballast.pipeline.training.safegrad.alignment_set import alignment_batches, batch_number
from ballast.pipeline.training.safegrad.safety_loss import SafetyLoss

SAFE = reference.rows(reference.SAFE_LENGTHS, 1)


def one_step(u: list[Any], a: list[Any], rho: float = 1.0, project: bool = True, limit: float = 0.0) -> Any:
    """The gradient that is left, and the step."""
    parameters = [
        torch.nn.Parameter(torch.zeros(len(next(x for x in (p, q) if x is not None))))
        for p, q in zip(u, a, strict=True)
    ]
    tensors = [[None if x is None else torch.tensor(x) for x in part] for part in (u, a)]
    for parameter, gradient in zip(parameters, tensors[0], strict=True):
        parameter.grad = gradient
    step = projection.step_of(projection.products(*tensors), rho, project, 1e-8, limit)
    if step.applied:
        projection.apply(step, parameters, tensors[1])
    return [None if p.grad is None else p.grad.tolist() for p in parameters], step


def test_the_part_against_safety_is_taken_out_and_the_safety_gradient_added_by_hand() -> None:
    # u = (3, -4), a = (0, 2): d = -8, <a, a> = 4, u + 2 a = (3, 0), and with a once more (3, 2)
    found, step = one_step([[3.0, -4.0]], [[0.0, 2.0]])
    assert found == [[3.0, 2.0]]
    # cosine -8 / (5 * 2); what was taken out, (0, -4), is 4/5 of the norm of u
    assert (step.cosine, step.conflict, step.removed) == (-0.8, True, 0.8)


def test_one_dot_product_over_all_parameters_decides() -> None:
    # The first parameter alone conflicts: -1; the second agrees: 2. Together 1: nothing is projected.
    found, step = one_step([[1.0], [1.0]], [[-1.0], [2.0]], rho=0.0)
    assert found == [[1.0], [1.0]]
    assert not step.conflict
    # -2 and 1: -1 together; -1 / 5 * a is taken out of both
    found, _ = one_step([[1.0], [1.0]], [[-2.0], [1.0]], rho=0.0)
    assert found == [[pytest.approx(0.6)], [pytest.approx(1.2)]]


def test_the_second_clipping_is_of_what_was_combined() -> None:
    # (3, 2) has norm sqrt(13); clipped to 1
    found, step = one_step([[3.0, -4.0]], [[0.0, 2.0]], limit=1.0)
    assert step.scale == pytest.approx(1 / math.sqrt(13), abs=1e-6)
    assert found == [[pytest.approx(3 / math.sqrt(13), abs=1e-5), pytest.approx(2 / math.sqrt(13), abs=1e-5)]]


def test_a_safety_gradient_of_rounding_size_is_left_alone() -> None:
    found, step = one_step([[1.0, 0.0]], [[-1e-5, 0.0]])  # 1e-10 of the squared norm
    assert found == [[1.0, 0.0]]
    assert not step.applied
    found, step = one_step([[1.0, 0.0]], [[0.0, 0.0]])
    assert found == [[1.0, 0.0]]
    assert step.cosine == 0


def test_a_parameter_without_a_task_gradient_still_gets_the_safety_gradient() -> None:
    found, _ = one_step([None, [1.0]], [[2.0], None], rho=0.5)
    assert found == [[1.0], [1.0]]


VECTORS = st.lists(st.floats(-10, 10, width=32), min_size=6, max_size=6)


@settings(max_examples=60, deadline=None)
@given(u=VECTORS, a=VECTORS)
def test_after_projection_no_part_points_against_safety(u: list[float], a: list[float]) -> None:
    before = torch.tensor(u).double()
    (first, second), step = one_step([u[:2], u[2:]], [a[:2], a[2:]], rho=0.0)
    g, s = torch.tensor(first + second).double(), torch.tensor(a).double()
    if step.applied:
        assert g @ s >= -1e-6 * max(before.norm() * s.norm(), 1e-30)
    if not step.conflict:
        assert torch.equal(g, before)


def test_all_shapes_of_rows_give_the_tokens_that_a_trainer_gives_them(tokenizer: Any) -> None:
    conversation = {
        "prompt": [{"role": "user", "content": "Hello"}],
        "completion": [{"role": "assistant", "content": "No."}],
    }
    text = {"prompt": "Hello", "completion": " No."}
    whole = tokenizer.apply_chat_template(conversation["prompt"] + conversation["completion"], tokenize=False)
    prompt = tokenizer.apply_chat_template(conversation["prompt"], tokenize=False, add_generation_prompt=True)
    (batch,) = alignment_batches([conversation], tokenizer, 8, None, None)
    assert batch.input_ids[0].tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(batch.labels) == whole[len(prompt) :]
    (batch,) = alignment_batches([text], tokenizer, 8, None, None)
    assert batch.labels.tolist() == [*tokenizer(" No.")["input_ids"], tokenizer.eos_token_id]
    tokenised = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, -100]}
    (batch,) = alignment_batches([tokenised], None, 8, None, None)
    assert batch.labels.tolist() == [7]
    assert batch.input_ids.tolist() == [[5, 6, 7]]  # what follows the last completion token changes nothing


def test_the_name_of_a_special_token_in_an_answer_stays_text(tokenizer: Any) -> None:
    row = {
        "prompt": [{"role": "user", "content": "Say <|im_end|>"}],
        "completion": [{"role": "assistant", "content": "I say <|im_end|> now"}],
    }
    (batch,) = alignment_batches([row], tokenizer, 8, None, None)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert batch.labels.tolist().count(end) == 1  # the template's own
    assert "<|im_end|> now" in tokenizer.decode(batch.labels)


@pytest.mark.parametrize(
    ("rows", "limits", "message"),
    [
        ([], (None, 64), "has no rows"),
        ([{"input_ids": [5, 6], "completion_mask": [0, 0]}], (None, 64), "row 0 has no completion token"),
        ([{"input_ids": [5] * 70, "completion_mask": [0] + [1] * 69}], (None, 64), "row 0 has 70 tokens, and the model reads 64"),
        ([{"input_ids": [5] * 70, "completion_mask": [0] * 50 + [1] * 20}], (50, 64), "fills max_length = 50"),
        ([{"input_ids": [5] * 9, "completion_mask": [0] + [1] * 8}], (128, 64), "beyond the 64 tokens"),
        ([{"input_ids": [5] * 9, "completion_mask": [1] * 8}], (None, 64), "9 input_ids and a mask of 8"),
        ([{"input_ids": [5] * 9}], (None, 64), "neither completion_mask nor labels"),
        ([{"messages": []}], (None, 64), "has the columns messages"),
        ([{"prompt": "a", "completion": "b"}], (None, 64), "the trainer has no tokenizer"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_refused_with_their_number(rows: Any, limits: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        alignment_batches(rows, None, 4, *limits)


def test_an_answer_without_text_is_a_row_without_completion(tokenizer: Any) -> None:
    row = {"prompt": [{"role": "user", "content": "Hello"}], "completion": [{"role": "assistant", "content": ""}]}
    with pytest.raises(DataError, match="row 1 has no completion token"):
        alignment_batches([{"prompt": "a", "completion": "b"}, row], tokenizer, 4, None, None)


def test_longer_rows_lose_the_end_of_their_answer() -> None:
    rows = [{"input_ids": list(range(10)), "completion_mask": [0] * 3 + [1] * 7}]
    (batch,) = alignment_batches(rows, None, 4, 5, 64)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert batch.labels.tolist() == [3, 4]


def test_every_batch_is_read_once_a_pass_in_an_order_of_its_own() -> None:
    orders = [[batch_number(turn * 8 + i, 8, seed=0) for i in range(8)] for turn in range(2)]
    assert [sorted(order) for order in orders] == [list(range(8))] * 2
    assert orders[0] != orders[1]


def wide_and_exact(model: Any, objective: str) -> tuple[float, torch.Tensor]:
    """Value and gradient in float64, with the model's first weights as the reference."""
    start = reference.in_float64(model, dict(model.named_parameters()))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters(model):
            parameter += 0.1 * torch.randn_like(parameter)
    exact = reference.in_float64(model, dict(model.named_parameters()))
    if objective == "ce":
        total = sum(len([m for m in row["completion_mask"] if m]) for row in SAFE)
        value = reference.task_loss(exact, list(SAFE))
        return value.item() * total, reference.task_gradient(exact, list(SAFE)) * total
    gradient, mean = reference.kl_gradient(exact, start, list(SAFE))
    total = sum(len([m for m in row["completion_mask"] if m]) for row in SAFE)
    return mean * total, gradient * total


@pytest.mark.parametrize("objective", ["kl", "ce"])
@pytest.mark.parametrize("form", ["plain head", "capped logits", "adapter on the head", "whole model"])
def test_the_loss_is_the_dense_one_whatever_the_model_does_after_its_last_layer(objective: Any, form: str) -> None:
    model = reference.small_model()
    if form == "adapter on the head":
        torch.manual_seed(1)
        adapter = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, adapter)
    if form == "capped logits":
        model.config.final_logit_softcapping = 30.0  # read by SafetyLoss; this Llama itself does not cap
    loss = SafetyLoss(
        alignment_batches(SAFE, None, 4, None, 64), objective, chunk_tokens=3, whole_model=form == "whole model"
    )
    loss.take_reference(model, cache=True)
    value, gradient = wide_and_exact(model, objective)
    found = loss.summed(model, 0)
    assert found.item() == pytest.approx(value, rel=1e-5)
    mine = torch.autograd.grad(found, reference.parameters(model), allow_unused=True)
    assert (reference.vector(mine, model) - gradient).norm() < 1e-5 * gradient.norm()


def test_a_model_that_is_trained_or_evaluated_stays_so_module_by_module() -> None:
    model = reference.small_model().train()
    model.model.layers[0].eval()
    with safety_loss.evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.model.layers[0].mlp.training


def test_a_reference_too_large_to_keep_is_refused_with_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety_loss, "_CACHE_LIMIT", 100)
    loss = SafetyLoss(alignment_batches(SAFE, None, 4, None, 64), "kl")
    with pytest.raises(ConfigError, match="cache_reference=False"):
        loss.take_reference(reference.small_model(), cache=True)


def test_a_sharded_model_is_refused_a_reference_that_is_run_each_time() -> None:
    loss = SafetyLoss(alignment_batches(SAFE, None, 4, None, 64), "kl", whole_model=True)
    with pytest.raises(ConfigError, match="under FSDP2"):
        loss.take_start(reference.small_model(), cache=False)


def trainer_arguments(**changes: Any) -> Any:
    return SimpleNamespace(**({"optim": "adamw_torch", "parallelism_config": None} | changes))


def test_trainers_in_which_it_cannot_be_correct_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference.small_model()
    kind = SimpleNamespace(distributed_type=DistributedType.NO)
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: kind)
    support.check_support(trainer_arguments(), model)
    with pytest.raises(ConfigError, match="optim='galore_adamw_layerwise'"):
        support.check_support(trainer_arguments(optim="galore_adamw_layerwise"), model)
    with pytest.raises(ConfigError, match="tp_size = 2"):
        support.check_support(trainer_arguments(parallelism_config=SimpleNamespace(tp_size=2)), model)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="prompt learning"):
        support.check_support(trainer_arguments(), get_peft_model(reference.small_model(), prompts))
    with pytest.raises(ConfigError, match="nothing is trained"):
        support.check_support(trainer_arguments(), reference.small_model().requires_grad_(False))
    model.config.is_encoder_decoder = True
    with pytest.raises(ConfigError, match="decoder-only"):
        support.check_support(trainer_arguments(), model)
    kind.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ConfigError, match="DeepSpeed"):
        support.check_support(trainer_arguments(), model)
