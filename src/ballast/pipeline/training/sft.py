"""SFT in which a guardrail says, token by token, how much is learnt: TRL's trainer and its loss, with our weights.

Read against TRL 1.16. Two hooks are overridden and nothing is copied:

* `_set_signature_columns_if_needed`: the columns with one value a token reach the collator;
* `compute_loss`: TRL's own, around a stand-in for the model whose log-probs are already shaped.

A contract test fails when upstream moves them (`tests/pipeline/training/test_sft_seams.py`).

    B rows   T positions   M tokens that are held near the reference
"""

from collections.abc import Callable
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from ballast.errors import ConfigError, DataError
from ballast.pipeline.config_sft import (
    ConstrainedLoss,
    CorrectedLoss,
    FaithfulLoss,
    PlainLoss,
    RejectLoss,
    SFTLoss,
)
from ballast.pipeline.training.chunked_kl import chunked_kl
from ballast.pipeline.training.logged_means import LoggedMeans
from ballast.pipeline.training.reference import (
    REFERENCE_COLUMN,
    Reference,
    adapter_is_new,
    base_model,
    captured_hidden,
    check_exact_kl,
    frozen_copy,
    output_layer,
    with_cached_log_probs,
)
from ballast.pipeline.training.sft_batches import (
    STAR_COLUMN,
    TokenColumnCollator,
    check_options,
    check_rows,
    truncated,
)
from ballast.pipeline.training.sft_losses import constrained_beta, constrained_weight, k2, shaped_log_prob, with_floor

DEFAULT_LOSS = CorrectedLoss()


class ShapedSFTTrainer(LoggedMeans, SFTTrainer):
    """`SFTTrainer` whose tokens weigh what a guardrail thinks of the text they stand in.

    The loss of a target token is `s * CE + kl_weight * (1 - s) * KL(pi || pi_ref)`, with s the token's STAR, divided by
    the target tokens of the whole optimizer step (arXiv 2505.17196, eq. 3); or one of the baselines, see
    `config_sft`. With `PlainLoss()`, and where every s is 1, it is TRL's loss bit for bit.

    Args:
        model: as for `SFTTrainer`.
        args: TRL's `SFTConfig`; packing and padding-free lose the weights and are refused.
        train_dataset: tokenised rows: `input_ids`, `labels` or `completion_mask`, and, where the loss asks a guard, `star`:
            the STAR of every token in [0, 1], 0 or 1 throughout for `RejectLoss` (`sft_rows.columns` makes them).
        eval_dataset: rows of the same form.
        loss: what a token weighs.
        reference: a frozen model to hold unsafe text near; None takes the policy as it is when the trainer is made: the
            model with its adapter switched off where that adapter is new, else a copy.
        progress: called with the number of rows whose reference log-probs were computed since the last call.
        **kwargs: as for `SFTTrainer`.

    Raises:
        ConfigError: an option that loses the weights, or a reference that cannot be had.
        DataError: a column is missing.
    """

    train_dataset: Any
    eval_dataset: Any
    data_collator: Any

    def __init__(
        self,
        model: Any = None,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        loss: SFTLoss = DEFAULT_LOSS,
        reference: Any = None,
        progress: Callable[[int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.loss = loss
        self._columns: tuple[str, ...] = ()
        args = args or SFTConfig(output_dir="trainer_output")
        if not isinstance(loss, PlainLoss):
            check_options(args, kwargs)
            self._columns = () if isinstance(loss, ConstrainedLoss) else (STAR_COLUMN,)
            train_dataset = self._checked(train_dataset, args, "train")
            eval_dataset = self._checked(eval_dataset, args, "eval")
        self._cached = getattr(loss, "cache_reference", False) and _reads_reference(loss)
        live = _reads_reference(loss) and not self._cached
        before = _copied_before(model, kwargs.get("peft_config")) if live and reference is None else None
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if isinstance(loss, CorrectedLoss) and live:
            check_exact_kl(self.model)
        self.reference = self._find_reference(reference or before) if live else None
        if self._cached:
            self._cache_reference(reference, progress)
        if self._columns:
            stock = self.data_collator
            self.data_collator = TokenColumnCollator(
                pad_token_id=stock.pad_token_id, pad_to_multiple_of=stock.pad_to_multiple_of, columns=self._columns
            )

    def _checked(self, dataset: Any, args: SFTConfig, role: str) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: self._checked(part, args, f"{role} '{name}'") for name, part in dataset.items()}
        check_rows(dataset, self._columns, role)
        return truncated(dataset, args, self._columns)

    def _find_reference(self, given: Any) -> Reference:
        if given is not None:
            given = given.eval().requires_grad_(False).to(self.accelerator.device)
            add_fused_lm_head(base_model(given))
            return Reference(given, precision=self.accelerator.autocast)
        if not hasattr(self.model, "peft_config") or not adapter_is_new(self.model):
            raise ConfigError(
                "the adapter changes the model from its first step on (init_lora_weights, or one that is no LoRA), so switching it "
                "off gives another model than the one that training starts from; take init_lora_weights=True, or give "
                "`reference` a frozen copy"
            )
        return Reference(self.model, adapter_off=True, precision=self.accelerator.autocast)

    def _cache_reference(self, given: Any, progress: Callable[[int], None] | None) -> None:
        own = Reference(self.model, precision=self.accelerator.autocast)
        reference = own if given is None else self._find_reference(given)
        collate = self.data_collator

        def log_probs(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return reference.log_probs({name: tensor.to(self.accelerator.device) for name, tensor in batch.items()})

        def cached(dataset: Any) -> Any:
            rows = self.args.per_device_train_batch_size
            return with_cached_log_probs(dataset, collate, log_probs, self._row_reads_reference, rows, progress)

        self.train_dataset = cached(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: cached(dataset) for name, dataset in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = cached(self.eval_dataset)
        self._columns = (*self._columns, REFERENCE_COLUMN)

    def _row_reads_reference(self, row: dict[str, Any]) -> bool:
        if isinstance(self.loss, ConstrainedLoss):
            return True
        return any(s < 1 for s, label in zip(row[STAR_COLUMN], row["labels"], strict=True) if label != -100)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self._columns if name not in self._signature_columns]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, of log-probs that are shaped."""
        if isinstance(self.loss, PlainLoss):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        columns = {name: inputs.pop(name)[:, 1:] for name in self._columns}
        return super().compute_loss(_Shaped(model, self, columns), inputs, return_outputs, num_items_in_batch)

    def shape(
        self,
        log_prob_BT: torch.Tensor,
        hidden: torch.Tensor | None,
        inputs: dict[str, torch.Tensor],
        columns: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """(B, T - 1) what TRL sums instead of the log-probs of the labels.

        Args:
            log_prob_BT: (B, T - 1) log-probs of the labels, 0 where they are ignored.
            hidden: (B, T, H) the policy's last hidden states; read by the exact KL alone.
            inputs: input_ids, attention_mask and labels, (B, T) each.
            columns: (B, T - 1) the columns with a value a token.
        """
        target_BT = inputs["labels"][:, 1:] != -100
        if isinstance(self.loss, ConstrainedLoss):
            return self._constrained(log_prob_BT, inputs, columns, target_BT)
        star_BT = columns[STAR_COLUMN]
        if isinstance(self.loss, CorrectedLoss):
            star_BT = with_floor(star_BT, self.loss.benign_floor)
        if isinstance(self.loss, RejectLoss) and not ((star_BT == 0) | (star_BT == 1) | ~target_BT).all():
            raise DataError(
                "loss type rs takes a verdict of 0 or 1 for the whole response, and the column 'star' holds other values; "
                "make it with `sft_rows.columns`, or take loss type faithful or corrected"
            )
        self._log("star", star_BT, target_BT)
        held_BT = target_BT & (star_BT < 1)
        kl_BT = torch.zeros_like(log_prob_BT)
        # The host waits for the device here: a batch that is wholly safe needs no reference.
        if _reads_reference(self.loss) and held_BT.any():
            kl_BT = self._kl(log_prob_BT, hidden, inputs, columns, held_BT)
            self._log("kl", kl_BT, held_BT)
        kl_weight = getattr(self.loss, "kl_weight", 0.0)
        return shaped_log_prob(log_prob_BT, star_BT, kl_BT, kl_weight * (1 - star_BT) * held_BT)

    def _constrained(
        self,
        log_prob_BT: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        columns: dict[str, torch.Tensor],
        target_BT: torch.Tensor,
    ) -> torch.Tensor:
        loss = self.loss
        assert isinstance(loss, ConstrainedLoss)
        if self.reference is None:
            reference_BT = columns[REFERENCE_COLUMN]
        else:
            reference_BT = self.reference.log_probs(_model_inputs(inputs, "labels"))
        beta_BT = constrained_beta(target_BT, loss.beta_first, loss.beta_early, loss.beta_later)
        weight_BT = constrained_weight(log_prob_BT, reference_BT, beta_BT)
        self._log("constrained_weight", weight_BT, target_BT)
        return log_prob_BT * weight_BT

    def _kl(
        self,
        log_prob_BT: torch.Tensor,
        hidden: torch.Tensor | None,
        inputs: dict[str, torch.Tensor],
        columns: dict[str, torch.Tensor],
        held_BT: torch.Tensor,
    ) -> torch.Tensor:
        """(B, T - 1) the KL where the loss reads it, 0 elsewhere."""
        if REFERENCE_COLUMN in columns:
            return k2(log_prob_BT, columns[REFERENCE_COLUMN]) * held_BT
        assert self.reference is not None
        rows = held_BT.any(dim=1)
        # What comes after the last held token of all rows changes nothing before it.
        width = int(held_BT.any(dim=0).nonzero().max()) + 2
        some = {name: tensor[rows, :width] for name, tensor in _model_inputs(inputs, "labels").items()}
        held = held_BT[rows, : width - 1]
        kl = torch.zeros(held.shape, dtype=torch.float32, device=held.device)
        if isinstance(self.loss, FaithfulLoss):
            kl = k2(log_prob_BT[rows, : width - 1], self.reference.log_probs(some)) * held
        else:
            assert isinstance(self.loss, CorrectedLoss)
            assert hidden is not None
            del some["labels"]
            reference_hidden, reference_head = self.reference.hidden(some)
            kl_M = chunked_kl(
                hidden[rows, : width - 1][held],
                output_layer(base_model(self.model)),
                reference_hidden[:, : width - 1][held],
                reference_head,
                self.loss.chunk_tokens,
            )
            kl = kl.masked_scatter(held, kl_M)
        whole = torch.zeros_like(log_prob_BT)
        whole[rows, : width - 1] = kl
        return whole

    def _log(self, name: str, value_BT: torch.Tensor, mask_BT: torch.Tensor) -> None:
        """The mean over the tokens of the mask."""
        values = value_BT.detach()[mask_BT]
        self.note_mean(f"sft/{name}", values.sum().item(), len(values))


class _Shaped:
    """Stands in for the model in TRL's `compute_loss`: the same outputs, with the log-probs shaped."""

    def __init__(self, model: Any, trainer: ShapedSFTTrainer, columns: dict[str, torch.Tensor]) -> None:
        self.model, self.trainer, self.columns = model, trainer, columns

    def __call__(self, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            return self.model(**inputs)
        with captured_hidden(self.trainer.model) as hidden:
            outputs = self.model(**inputs, fused_lm_head=True)
        outputs.log_probs = self.trainer.shape(outputs.log_probs, hidden[-1], inputs, self.columns)
        return outputs


def _reads_reference(loss: SFTLoss) -> bool:
    return isinstance(loss, ConstrainedLoss) or getattr(loss, "kl_weight", 0.0) > 0


def _model_inputs(inputs: dict[str, torch.Tensor], *further: str) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask", *further)}


def _copied_before(model: Any, peft_config: Any) -> Any:
    """A frozen copy of the policy, taken before the trainer wraps it, where no adapter can be switched off.

    Raises:
        ConfigError: the model is still a name.
    """
    if peft_config is not None or (hasattr(model, "peft_config") and adapter_is_new(model)):
        return None
    if isinstance(model, str):
        raise ConfigError(
            "without `peft_config` the whole model is trained, and its reference is a frozen copy; load the model first and "
            "give the trainer the object, or give `reference` the copy"
        )
    return frozen_copy(model)
