"""The reference policy pi_ref: what a shaped loss holds unsafe text near.

It is the policy as it was before the training. Where a LoRA began as no change at all, that is the same model with
the adapter switched off; an adapter that had learnt something before is switched off together with what it learnt,
so there it is a frozen copy.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from ballast.errors import ConfigError

REFERENCE_COLUMN = "reference_log_probs"

# Settings of a model that change its logits after the output layer, which the exact KL does not go through.
_AFTER_THE_HEAD = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


class Reference:
    """A frozen policy.

    Args:
        model: the reference's own model, or the policy's.
        adapter_off: switch the adapter of `model` off meanwhile.
        precision: the autocast of the training; another precision would be a KL of its own.
    """

    def __init__(self, model: Any, adapter_off: bool = False, precision: Callable[[], Any] = nullcontext) -> None:
        self.model = model
        self.adapter_off = adapter_off
        self.precision = precision

    def log_probs(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, T - 1) log-prob of every label, 0 where the label is ignored.

        Args:
            inputs: input_ids, attention_mask and labels, (B, T) each.
        """
        with self._frozen():
            log_probs: torch.Tensor = self.model(**inputs, fused_lm_head=True).log_probs
            return log_probs

    def hidden(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor | None]]:
        """(B, T, H) last hidden states, and weight and bias of the output layer.

        Args:
            inputs: input_ids and attention_mask, (B, T) each.
        """
        with self._frozen():
            base = base_model(self.model)
            hidden: torch.Tensor = base.base_model(**inputs, use_cache=False).last_hidden_state
            return hidden, output_layer(base)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()  # no dropout, and so no random numbers used up
        try:
            off = self.model.disable_adapter() if self.adapter_off else nullcontext()
            with torch.no_grad(), self.precision(), off:
                yield
        finally:
            self.model.train(training)


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def output_layer(base: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (V, H) and bias (V,) of the layer that makes logits."""
    head = base.get_output_embeddings()
    return head.weight, head.bias


@contextmanager
def captured_hidden(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the last hidden states of forwards in this block, with their graph: one forward then serves two losses."""
    found: list[torch.Tensor] = []
    hook = base_model(model).base_model.register_forward_hook(
        lambda module, args, output: found.append(output.last_hidden_state)
    )
    try:
        yield found
    finally:
        hook.remove()


def adapter_is_new(model: Any) -> bool:
    """Whether the model's one adapter is a LoRA that changes nothing yet: every B is 0."""
    configs = list(model.peft_config.values())
    if len(configs) != 1 or str(getattr(configs[0].peft_type, "value", configs[0].peft_type)) != "LORA":
        return False
    return not any(
        bool(p.any()) for name, p in model.named_parameters() if ".lora_B." in name or "lora_embedding_A" in name
    )


def frozen_copy(model: Any) -> Any:
    """A copy of the model that never learns; it takes the model's memory once more."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def after_the_head(model: Any) -> tuple[str, Any] | None:
    """A setting of the model that changes its logits after the output layer, and its value; None where there is none."""
    config = base_model(model).config.get_text_config()
    for name in _AFTER_THE_HEAD:
        value = getattr(config, name, None)
        if value not in (None, 1, 1.0):
            return name, value
    return None


def check_exact_kl(model: Any) -> None:
    """The exact KL computes logits as hidden states times the output layer.

    Raises:
        ConfigError: the model changes its logits after that.
    """
    changed = after_the_head(model)
    if changed is not None:
        raise ConfigError(
            f"the exact KL does not know {changed[0]} = {changed[1]} of {type(base_model(model)).__name__}, which changes logits after "
            "the output layer; take loss type faithful, whose KL reads the model's own log-probs"
        )


def with_cached_log_probs(
    dataset: Any,
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    log_probs: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    needs: Callable[[dict[str, Any]], bool],
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """The data set with a column of the reference's log-probs, one a token of `input_ids`.

    The entry of a token is log pi_ref of that token after those before it; 0 at the first token and where the label is
    ignored. A row that needs none has 0 throughout.

    Args:
        dataset: tokenised rows with `input_ids` and `labels`.
        collate: makes a padded batch of rows.
        log_probs: (B, T - 1) of a batch.
        needs: whether a row's loss reads its reference.
        batch_size: rows a forward.
        progress: called with the number of rows done since the last call.
    """
    columns = [[0.0] * len(ids) for ids in dataset["input_ids"]]
    todo = sorted((n for n, row in enumerate(dataset) if needs(row)), key=lambda n: len(columns[n]))
    for start in range(0, len(todo), batch_size):
        numbers = todo[start : start + batch_size]
        batch = collate([dataset[n] for n in numbers])
        found = log_probs(batch).float().cpu()
        for n, row in zip(numbers, found, strict=True):
            columns[n][1:] = row[: len(columns[n]) - 1].tolist()
        if progress is not None:
            progress(len(numbers))
    if progress is not None:
        progress(len(columns) - len(todo))
    if REFERENCE_COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(REFERENCE_COLUMN)
    return dataset.add_column(REFERENCE_COLUMN, columns)
