"""SafeGrad written once more, in float64 and a few lines, and what watches a training from outside."""

import copy
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

PROMPT = 3
TASK_LENGTHS = (9, 6, 12, 7, 10, 8, 11, 5)
SAFE_LENGTHS = (8, 11, 6, 9)


def small_model() -> Any:
    """A random Llama of 2 layers and 64 words, fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(lengths: tuple[int, ...], seed: int) -> Dataset:
    """Tokenised rows; the prompts of all sets are drawn alike, so that they meet."""
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_list(
        [
            {
                "input_ids": torch.randint(3, 40, (length,), generator=generator).tolist(),
                "completion_mask": [0] * PROMPT + [1] * (length - PROMPT),
            }
            for length in lengths
        ]
    )


class Watcher(TrainerCallback):
    """Keeps weights and gradients of every optimizer step, as they are at its place among the callbacks."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor | None]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        self.gradients.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )


def in_float64(pristine: Any, weights: dict[str, torch.Tensor]) -> Any:
    """A model in float64 with these weights; `pristine` was copied before a trainer put its own forward on it.

    Adapters that a trainer has added beside (DPO's copy of the first one) are left out: they are not switched on.
    """
    model = copy.deepcopy(pristine).eval().double()
    own = {name: weights[name] for name, _ in model.named_parameters()}
    model.load_state_dict(own, strict=False)
    return model


def dense_log_probs(model: Any, row: Any) -> torch.Tensor:
    """(T - 1, V) log-probs in float64, one row at a time, without padding."""
    return torch.log_softmax(model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1], dim=-1)


def parameters(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def task_loss(model: Any, batch: list[Any]) -> torch.Tensor:
    """The mean cross-entropy over all target tokens of the step."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in batch:
        log_p = dense_log_probs(model, row)
        for t in range(1, len(row["input_ids"])):
            if row["completion_mask"][t]:
                total, tokens = total - log_p[t - 1, row["input_ids"][t]], tokens + 1
    return total / tokens


def task_gradient(model: Any, batch: list[Any]) -> torch.Tensor:
    """Its gradient as one long vector."""
    return vector(torch.autograd.grad(task_loss(model, batch), parameters(model), allow_unused=True), model)


def kl_gradient(model: Any, start: Any, batch: list[Any]) -> tuple[torch.Tensor, float]:
    """The gradient of KL(start || model), mean over completion tokens, as one long vector, and the KL."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in batch:
        log_p = dense_log_probs(model, row)
        with torch.no_grad():
            log_q = dense_log_probs(start, row)
        for t in range(1, len(row["input_ids"])):
            if row["completion_mask"][t]:
                total = total + (log_q[t - 1].exp() * (log_q[t - 1] - log_p[t - 1])).sum()
                tokens += 1
    mean = total / tokens
    return vector(torch.autograd.grad(mean, parameters(model), allow_unused=True), model), mean.item()


def vector(gradients: Any, model: Any) -> torch.Tensor:
    parts = zip(gradients, parameters(model), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).double().reshape(-1) for g, p in parts])


def clipped(gradient: torch.Tensor, limit: float) -> torch.Tensor:
    return gradient * min(1.0, limit / (gradient.norm().item() + 1e-6)) if limit else gradient


def combined(u: torch.Tensor, a: torch.Tensor, rho: float, limit: float, project: bool = True) -> torch.Tensor:
    """clip(project(clip(u)) + rho * a)."""
    u = clipped(u, limit)
    if (a @ a) < 1e-8 * (u @ u):
        return u
    d = u @ a
    if d < 0 and project:
        u = u - d / (a @ a) * a
    return clipped(u + rho * a, limit)
