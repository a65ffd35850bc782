"""Calibration rows from data: harmful requests with safe answers, in the chat format of the model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ballast.errors import DataError
from ballast.pipeline.data import Row
from ballast.pipeline.restoration.nlsr.activations import CalibrationRow

if TYPE_CHECKING:
    from ballast.pipeline.prompting import PromptFormat

MAX_ROWS, MAX_LENGTH = 128, 512


def calibration_rows(
    prompt_format: "PromptFormat", rows: Sequence[Row], max_rows: int = MAX_ROWS, max_length: int = MAX_LENGTH
) -> list[CalibrationRow]:
    """Harmful requests with their answers, of which the answers' tokens count.

    Args:
        prompt_format: the chat format that the aligned model was trained under.
        rows: the first `max_rows` of kind harmful are taken.
        max_rows: how many.
        max_length: tokens after which a row is cut off.

    Raises:
        DataError: none is harmful, one has no answer, or a request leaves no room for its answer.
    """
    harmful = [row for row in rows if row.kind == "harmful"][:max_rows]
    if not harmful:
        raise DataError(
            f"none of {len(rows)} calibration rows is a harmful request; safety neurons are told by how the model declines: give "
            "harmful requests with safe answers"
        )
    return [_row(prompt_format, row, max_length) for row in harmful]


def _row(prompt_format: "PromptFormat", row: Row, max_length: int) -> CalibrationRow:
    if not row.response:
        raise DataError(
            f"calibration row {row.id} has no answer; give the answer that the aligned model should give to it"
        )
    tokenizer = prompt_format.tokenizer
    prompt = prompt_format.encode_request(row.id, row.prompt)
    answer = tokenizer(row.response, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if len(prompt) >= max_length:
        raise DataError(
            f"calibration row {row.id}: its request has {len(prompt)} tokens, so a length of {max_length} leaves no room for the "
            "answer; raise it or drop the row"
        )
    return CalibrationRow(tuple([*prompt, *answer, tokenizer.eos_token_id][:max_length]), len(prompt))
