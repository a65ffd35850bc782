"""Calibration rows from data: harmful requests with safe answers, in the chat format of the model."""

from collections.abc import Sequence
from typing import Any

from ballast.errors import DataError, ModelError
from ballast.pipeline.config_inputs import DataConfig
from ballast.pipeline.data import Row, load_rows
from ballast.pipeline.model_record import check_record
from ballast.pipeline.prompting import PromptFormat
from ballast.pipeline.restoration.nlsr.activations import CalibrationRow
from ballast.pipeline.restoration.weights import Weights

MAX_ROWS, MAX_LENGTH = 128, 512


def read_calibration(
    aligned: Weights,
    sources: Sequence[str],
    system_prompt: str | None = None,
    max_rows: int = MAX_ROWS,
    max_length: int = MAX_LENGTH,
) -> list[CalibrationRow]:
    """Calibration rows from files, in the aligned model's own chat format.

    Args:
        aligned: the model; of a LoRA without a tokenizer that of its base is taken.
        sources: as in `data.train`: `shipped`, files, hub ids; with the columns prompt, response and kind.
        system_prompt: under which the model was trained.
        max_rows: see `calibration_rows`.
        max_length: see `calibration_rows`.

    Raises:
        DataError: the rows cannot be used, see there.
        ModelError: there is no tokenizer, or the model was trained under another prompt format.
    """
    prompt_format = PromptFormat(_tokenizer(aligned), system_prompt)
    check_record(aligned.folder, prompt_format)
    return calibration_rows(
        prompt_format, load_rows(sources, "train", DataConfig(), answers=True), max_rows, max_length
    )


def _tokenizer(weights: Weights) -> Any:
    from transformers import AutoTokenizer

    own = weights.base is None or any(weights.folder.glob("tokenizer*"))
    folder = weights.folder if own or weights.base is None else weights.base.folder
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the tokenizer of {weights.label} '{folder}' cannot be loaded ({str(error).splitlines()[0]}); save it beside the weights "
            "with save_pretrained"
        ) from error


def calibration_rows(
    prompt_format: PromptFormat, rows: Sequence[Row], max_rows: int = MAX_ROWS, max_length: int = MAX_LENGTH
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


def _row(prompt_format: PromptFormat, row: Row, max_length: int) -> CalibrationRow:
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
