"""Rows of a shaped data set: columns with a value a token, kept beside the tokens from the data set to the batch.

TRL drops columns that it does not know, in three places and without a word, and cuts `input_ids` and `labels` alone.
So the columns are cut here, and a batch without them is an error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ballast.errors import ConfigError, DataError

STAR_COLUMN = "star"
_MASKS = ("labels", "completion_mask", "assistant_masks")


@dataclass
class TokenColumnCollator(DataCollatorForLanguageModeling):
    """TRL's collator with further float columns of one value a token, padded with 0.

    Padding carries no label, so its value enters no loss.
    """

    columns: tuple[str, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad a batch.

        Raises:
            DataError: a row lacks a column, has another number of values than tokens, or a STAR outside [0, 1].
        """
        for name in self.columns:
            for example in examples:
                _check_column(name, example)
        batch: dict[str, Any] = super().torch_call(examples)
        for name in self.columns:
            padded = torch.zeros(batch["input_ids"].shape, dtype=torch.float32)
            for row, example in zip(padded, examples, strict=True):
                row[: len(example[name])] = torch.tensor(example[name], dtype=torch.float32)
            batch[name] = padded
        star = batch.get(STAR_COLUMN)
        if star is not None and not ((star >= 0) & (star <= 1)).all():  # NaN fails this too
            raise DataError(
                "a row of the batch has a STAR that is no number in [0, 1]; leave answers out whose cuts are not all scored"
            )
        return batch


def _check_column(name: str, example: dict[str, Any]) -> None:
    if example.get(name) is None:
        raise DataError(
            f"a row of the batch has no column '{name}', so its tokens have no weight; give the data set that column, and take out "
            "whatever drops it (packing, select_columns, a data set of your own given to evaluate)"
        )
    if len(example[name]) != len(example["input_ids"]):
        raise DataError(
            f"a row has {len(example[name])} values in '{name}' for {len(example['input_ids'])} tokens; give one value a token, and "
            "cut both at the same place"
        )


def check_options(args: SFTConfig, kwargs: Mapping[str, Any]) -> None:
    """Refuse what loses or distorts weights a token.

    Args:
        args: TRL's options.
        kwargs: the trainer's further arguments.

    Raises:
        ConfigError: names the option, its value and the reason.
    """
    parallel = getattr(args, "parallelism_config", None)
    wrong: list[tuple[bool, str, Any, str, Any]] = [
        (args.packing, "packing", True, "it drops every column that has a weight a token", False),
        (bool(args.eval_packing), "eval_packing", True, "it drops every column that has a weight a token", None),
        (
            args.padding_free,
            "padding_free",
            True,
            "it flattens rows into one, and the weights would stay behind",
            False,
        ),
        (args.loss_type != "nll", "loss_type", args.loss_type, "it weighs tokens by their probability itself", "nll"),
        (
            args.label_smoothing_factor > 0,
            "label_smoothing_factor",
            args.label_smoothing_factor,
            "its loss is computed without the weights",
            0.0,
        ),
        (
            parallel is not None and (parallel.cp_enabled or parallel.sp_enabled),
            "parallelism_config",
            "with context or sequence parallelism",
            "it splits rows, and the weights would stay whole",
            None,
        ),
    ]
    for is_wrong, name, value, reason, instead in wrong:
        if is_wrong:
            raise ConfigError(
                f"SFTConfig.{name} = {value!r} does not work with weights a token: {reason}; set {name}={instead!r}"
            )
    for name in ("data_collator", "compute_loss_func", "formatting_func"):
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"`{name}` takes the place of what carries the weights; leave it out, or take PlainLoss()"
            )


def check_rows(dataset: Any, columns: Sequence[str], role: str) -> None:
    """The data set is tokenised and has the columns.

    Raises:
        ConfigError: the data set is streamed.
        DataError: a column is missing.
    """
    names = getattr(dataset, "column_names", None)
    if names is None or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"the {role} data set is streamed, and shaped SFT reads its rows before training; load it whole (streaming=False)"
        )
    for name in ("input_ids", *columns):
        if name not in names:
            raise DataError(
                f"the {role} data set has no column '{name}'; it has {', '.join(names)}. Give token ids and one value a token: "
                "TRL's own tokenisation would leave no place for them (`sft_rows.columns` makes both)"
            )


def truncated(dataset: Any, args: SFTConfig, columns: Sequence[str]) -> Any:
    """The data set with all that has one entry a token cut to `max_length` at once, by `truncation_mode`."""
    if args.max_length is None:
        return dataset
    kept = slice(None, args.max_length) if args.truncation_mode == "keep_start" else slice(-args.max_length, None)
    names = [name for name in ("input_ids", *_MASKS, *columns) if name in dataset.column_names]

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        for name in columns:
            _check_column(name, row)
        return {name: row[name][kept] for name in names}

    return dataset.map(cut, desc="Truncating rows and their weights")
