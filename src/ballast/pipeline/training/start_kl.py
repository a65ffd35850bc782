"""KL to the start model in the loss of any SFT trainer: a mixin in front of its class.

    class HeldSFT(StartModelKL, SFTTrainer): ...
    trainer = HeldSFT(model, args, rows, start_kl_weight=0.1)

The policy's hidden states are those of the trainer's own forward; the start model costs one forward more.
"""

from typing import Any

import torch

from ballast.errors import ConfigError
from ballast.pipeline.training.chunked_kl import chunked_kl
from ballast.pipeline.training.logged_means import LoggedMeans
from ballast.pipeline.training.reference import (
    Reference,
    adapter_is_new,
    base_model,
    captured_hidden,
    check_exact_kl,
    frozen_copy,
    output_layer,
)


class StartModelKL(LoggedMeans):
    """Mixin: adds `weight * sum over tokens of KL(policy || start) / target tokens of the optimizer step` to the loss.

    The start model is the policy with its adapter switched off where the adapter is new, else a frozen copy. Logs
    `regularization/kl`, nats a chosen token.

    Args:
        start_kl_weight: above 0.
        start_kl_tokens: `answer` (what the loss is on), `prompt` (the rest), or `all`; padding never.

    Raises:
        ConfigError: a model given by its name, without a new adapter; one whose logits change after its output layer;
            packing, or batches without padding.
    """

    model: Any
    accelerator: Any
    args: Any

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        start_kl_weight: float,
        start_kl_tokens: str = "answer",
        **kwargs: Any,
    ) -> None:
        new = kwargs.get("peft_config") is not None or (hasattr(model, "peft_config") and adapter_is_new(model))
        if not new and isinstance(model, str):
            raise ConfigError(
                "the KL to the start model needs a frozen copy where the whole model is trained; load the model first and give "
                "the trainer the object"
            )
        copied = None if new else frozen_copy(model)
        super().__init__(model, *args, **kwargs)
        self.start_kl_weight, self.start_kl_tokens = start_kl_weight, start_kl_tokens
        check_exact_kl(self.model)
        for name in ("packing", "eval_packing", "padding_free"):
            if getattr(self.args, name, False):
                raise ConfigError(
                    f"the KL to the start model with {name}: rows stand behind each other in one sequence, and the start model is not "
                    f"told where one ends and the next begins; set {name}=False"
                )
        if copied is None and not adapter_is_new(self.model):
            raise ConfigError(
                "the adapter changes the model from its first step on (init_lora_weights, or one that is no LoRA), so without it "
                "the model is not the start model; take init_lora_weights=True"
            )
        held = self.model if copied is None else copied.to(self.accelerator.device)
        self._start = Reference(held, adapter_off=copied is None, precision=self.accelerator.autocast)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss plus the KL."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        attention = inputs.get("attention_mask", torch.ones_like(ids))
        with captured_hidden(self.model) as hidden:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        answer = labels[:, 1:] != -100
        read = attention[:, 1:].bool()
        chosen = {"answer": answer, "prompt": read & ~answer, "all": read}[self.start_kl_tokens]
        count = answer.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        start_hidden, start_head = self._start.hidden({"input_ids": ids, "attention_mask": attention})
        # The first forward is the policy's; a trainer may run its reference after it.
        kl_M = chunked_kl(
            hidden[0][:, :-1][chosen], output_layer(base_model(self.model)), start_hidden[:, :-1][chosen], start_head
        )
        held = self.start_kl_weight * kl_M.sum() / count
        if num_items_in_batch is not None and getattr(self.args, "average_tokens_across_devices", False):
            held = held * self.accelerator.num_processes  # gradients are averaged over processes, the count is of all
        self.note_mean("regularization/kl", float(kl_M.detach().sum()), len(kl_M))
        return (result[0] + held, result[1]) if return_outputs else result + held
