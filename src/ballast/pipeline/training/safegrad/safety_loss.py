"""How far a policy is from safe answers: the loss whose gradient SafeGrad protects, on batches of the alignment set.

    M completion tokens of a batch   H hidden size   V vocabulary

`kl` is KL(pi_ref || pi), `ce` the cross-entropy of the completions; both summed over completion tokens, in fp32, a few
tokens at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from ballast.errors import ConfigError
from ballast.pipeline.training.chunked_kl import chunked_kl
from ballast.pipeline.training.reference import (
    adapter_is_new,
    after_the_head,
    base_model,
    frozen_copy,
    output_layer,
)
from ballast.pipeline.training.safegrad.alignment_set import AlignmentBatch

Objective = Literal["kl", "ce"]
Head = tuple[torch.Tensor, torch.Tensor | None]
_CACHE_LIMIT = 8 * 2**30  # bytes


@dataclass(frozen=True)
class Predictions:
    """What a policy predicts at the completion tokens of a batch.

    Attributes:
        states: (M, H) last hidden states; (M, V) logits where `head` is None.
        head: weight (V, H) and bias (V,) of the output layer.
    """

    states: torch.Tensor
    head: Head | None


class SafetyLoss:
    """The loss on numbered batches, against a reference that never changes.

    Args:
        batches: the alignment set.
        objective: `kl` or `ce`; `ce` has no reference.
        precision: makes the autocast of the training.
        chunk_tokens: tokens whose distributions are in memory at a time.
        whole_model: read logits from a call of the whole model, as sharded parameters need it.
    """

    def __init__(
        self,
        batches: Sequence[AlignmentBatch],
        objective: Objective,
        precision: Callable[[], Any] = nullcontext,
        chunk_tokens: int = 128,
        whole_model: bool = False,
    ) -> None:
        self.batches = batches
        self.objective = objective
        self.precision = precision
        self.chunk_tokens = chunk_tokens
        self.whole_model = whole_model
        self._reference: Callable[[int, Any], Predictions] | None = None

    def take_reference(self, model: Any, cache: bool, adapter_off: bool = False) -> None:
        """Make a model the reference, as it is now.

        Args:
            model: the reference.
            cache: compute its hidden states at all completion tokens now, and keep them in the CPU's memory; False runs it
                again for every batch.
            adapter_off: switch the model's adapter off meanwhile.

        Raises:
            ConfigError: the cache would take more than 8 GiB.
        """
        if self.objective == "ce":
            return
        if cache:
            self._reference = self._cached(model, adapter_off)
            return

        def run(number: int, device: Any) -> Predictions:
            return self._frozen(model, self.batches[number].to(device), adapter_off)

        self._reference = run

    def take_start(self, model: Any, cache: bool) -> None:
        """Make the policy the reference, as it is now: cached, as itself with a new adapter switched off, or as a frozen copy.

        Raises:
            ConfigError: no cache where the policy is sharded, or one that would take more than 8 GiB.
        """
        if self.objective == "ce":
            return
        if cache:
            self.take_reference(model, cache=True)
        elif self.whole_model:
            raise ConfigError(
                "cache_reference=False under FSDP2 would need a second sharded model; leave cache_reference at True, or give `reference` a model"
            )
        elif hasattr(model, "peft_config") and adapter_is_new(model):
            self.take_reference(model, cache=False, adapter_off=True)
        else:
            self.take_reference(frozen_copy(model), cache=False)

    def summed(self, model: Any, number: int) -> torch.Tensor:
        """The loss of a batch, summed over its completion tokens, differentiable in the model's parameters."""
        device = next(model.parameters()).device
        batch = self.batches[number].to(device)
        reference = self._reference(number, device) if self._reference is not None else None
        # An autocast of its own: one that the reference shared would hand on casts that carry no gradient.
        with evaluating(model), self.precision():
            found = self._predictions(model, batch)
            return self._loss(found, reference, batch)

    def _loss(self, found: Predictions, reference: Predictions | None, batch: AlignmentBatch) -> torch.Tensor:
        head = found.head
        if self.objective == "ce":
            return self._by_chunks(
                lambda states, labels: _cross_entropy(states, head, labels), found.states, batch.labels
            )
        assert reference is not None
        other = reference.head
        if head is not None and other is not None:
            kl_M = chunked_kl(found.states, head, reference.states, other, self.chunk_tokens, under_reference=True)
            return kl_M.sum()
        return self._by_chunks(lambda pi, pi_ref: _dense_kl(pi, head, pi_ref, other), found.states, reference.states)

    def _by_chunks(self, loss: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        parts = zip(*(tensor.split(self.chunk_tokens) for tensor in tensors), strict=True)
        # The distributions of a chunk are made again on the way back, and not kept.
        return torch.stack(
            [checkpoint(loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        ).sum()

    def _predictions(self, model: Any, batch: AlignmentBatch) -> Predictions:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        base = base_model(model)
        if self.whole_model or not _has_plain_head(model):
            return Predictions(model(**inputs).logits[:, :-1][batch.predicts], None)
        hidden = base.base_model(**inputs).last_hidden_state[:, :-1]
        return Predictions(hidden[batch.predicts], output_layer(base))

    def _frozen(self, model: Any, batch: AlignmentBatch, adapter_off: bool) -> Predictions:
        off = model.disable_adapter() if adapter_off else nullcontext()
        with without_gradient(model), evaluating(model), off, self.precision():
            return self._predictions(model, batch)

    def _cached(self, model: Any, adapter_off: bool) -> Callable[[int, Any], Predictions]:
        device = next(model.parameters()).device
        kept: list[torch.Tensor] = []
        head: Head | None = None
        for batch in self.batches:
            found = self._frozen(model, batch.to(device), adapter_off)
            head = found.head
            kept.append(found.states.cpu())
            self._check_size(kept)
        if head is not None and head[0].requires_grad:  # trained, it will be another
            weight, bias = head
            head = (weight.detach().clone(), None if bias is None else bias.detach().clone())

        def look_up(number: int, device: Any) -> Predictions:
            return Predictions(kept[number].to(device), head)

        return look_up

    def _check_size(self, kept: list[torch.Tensor]) -> None:
        taken = sum(tensor.nbytes for tensor in kept)
        if taken > _CACHE_LIMIT:
            raise ConfigError(
                f"the reference's predictions for {len(kept)} of {len(self.batches)} alignment batches take {taken / 2**30:.0f} GiB, and "
                f"at most {_CACHE_LIMIT / 2**30:.0f} are kept; give fewer alignment rows (20 are enough for the KL), or "
                "set cache_reference=False"
            )


@contextmanager
def without_gradient(model: Any) -> Iterator[None]:
    """No graph; under FSDP2 the weights that a forward gathered are given up afterwards.

    A backward does that by itself. Without one the root's would stay gathered, and the next forward would read them instead of
    the shards that the optimizer has changed.
    """
    try:
        with torch.no_grad():
            yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Every module in evaluation mode: no dropout, no random numbers, and no gradient checkpointing, whose reentrant form loses these gradients."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _has_plain_head(model: Any) -> bool:
    """Whether logits are hidden states times the output layer, and nothing else; an adapter on that layer is something else."""
    return type(base_model(model).get_output_embeddings()) is torch.nn.Linear and after_the_head(model) is None


def _log_softmax(states: torch.Tensor, head: Head | None) -> torch.Tensor:
    logits = states if head is None else torch.nn.functional.linear(states, *head)
    return torch.log_softmax(logits.float(), dim=-1)


def _cross_entropy(states: torch.Tensor, head: Head | None, labels: torch.Tensor) -> torch.Tensor:
    return -_log_softmax(states, head).gather(-1, labels[:, None]).sum()


def _dense_kl(states: torch.Tensor, head: Head | None, reference: torch.Tensor, other: Head | None) -> torch.Tensor:
    log_q = _log_softmax(reference, other)
    return (log_q.exp() * (log_q - _log_softmax(states, head))).sum()
