"""Rows of a JSON-lines file for a guard to judge: every line is read and checked before the first is judged."""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ballast.errors import DataError
from ballast.guardrails.types import Exchange, Message

STDIN = "-"


@dataclass(frozen=True)
class Columns:
    """Names of the columns.

    A named id, category or label must be in every row; None takes `id` and `category` where they are, and no label.
    """

    prompt: str = "prompt"
    messages: str = "messages"
    response: str = "response"
    id: str | None = None
    category: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class InputRow:
    """One row to judge.

    Attributes:
        line: line of the file, from 1.
        id: what the file calls it, else the line.
        exchange: what to judge.
        category: the file's own category of it.
        unsafe: its label, where one was asked for.
    """

    line: int
    id: str
    exchange: Exchange
    category: str | None
    unsafe: bool | None = None


def read_rows(source: str, columns: Columns) -> tuple[list[InputRow], str]:
    """Read a file of JSON objects, one a line; blank lines are skipped.

    A row has a response, and a prompt: text or a list of messages in the column `prompt`, or `messages`. Where the
    row has `messages` and no response, the last assistant turn is the response.

    Args:
        source: path of the file; `-` reads standard input.
        columns: names of the columns.

    Returns:
        The rows, and the sha256 of the file's bytes.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or a line is no such row; the message names the line and
            never quotes it.
    """
    content = _content(source)
    name = "standard input" if source == STDIN else f"'{source}'"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"line {line} of {name} is not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    # Not splitlines(), which also breaks at characters that may stand inside a JSON string.
    rows = [
        _row(_object(line, number, name), number, name, columns)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{name} has no rows; give a file with one JSON object a line")
    return rows, hashlib.sha256(content).hexdigest()


def _content(source: str) -> bytes:
    if source == STDIN:
        return sys.stdin.buffer.read()
    path = Path(source).expanduser()
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"'{source}' cannot be read ({error.strerror}); give a JSON-lines file, or - for stdin"
        ) from None


def _object(line: str, number: int, name: str) -> dict[str, Any]:
    # Of an error its kind and its place alone: nothing may quote the line.
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _not_json(f"{error.msg} at character {error.colno}", number, name) from None
    except RecursionError:
        raise _not_json("nested too deep", number, name) from None
    except ValueError:  # Python's limit on digits
        raise _not_json("a number too long", number, name) from None
    if not isinstance(record, dict):
        raise DataError(
            f"line {number} of {name} holds a {type(record).__name__}, not an object with columns; write it like "
            '{"prompt": "...", "response": "..."}'
        )
    return record


def _not_json(why: str, number: int, name: str) -> DataError:
    return DataError(
        f"line {number} of {name} is not JSON ({why}); write one whole JSON object a line (`jq -c .[] FILE` turns a list "
        "into such lines)"
    )


def _row(record: dict[str, Any], number: int, name: str, columns: Columns) -> InputRow:
    where = f"line {number} of {name}"
    messages = _messages(record, where, columns)
    response = record.get(columns.response)
    if response is None and columns.response not in record and messages and messages[-1]["role"] == "assistant":
        response = messages[-1]["content"]
        messages = messages[:-1]
    if columns.response not in record and response is None:
        raise _missing(columns.response, "--response-column", record, where)
    if not isinstance(response, str):
        raise DataError(
            f"{where}: column '{columns.response}' holds a {type(response).__name__}, not text; mend or remove the row"
        )
    row_id = _label(record, columns.id, "id", "--id-column", where)
    category = _label(record, columns.category, "category", "--category-column", where)
    unsafe = _unsafe(record, columns.label, where) if columns.label else None
    return InputRow(number, row_id or str(number), Exchange(messages, response), category, unsafe)


def _messages(record: dict[str, Any], where: str, columns: Columns) -> tuple[Message, ...]:
    column = columns.messages if columns.messages in record else columns.prompt
    if column not in record:
        raise _missing(columns.prompt, "--prompt-column (or --messages-column)", record, where)
    value = record[column]
    if isinstance(value, str) and column == columns.prompt:
        return ({"role": "user", "content": value},)
    turns = tuple(_turns(value)) if isinstance(value, list) else ()
    if not turns or len(turns) < len(value):
        raise DataError(
            f"{where}: column '{column}' holds neither text nor a list of messages; write it like "
            '[{"role": "user", "content": "..."}]'
        )
    return turns


def _turns(value: list[Any]) -> Iterator[Message]:
    for turn in value:
        if isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str):
            yield {"role": turn["role"], "content": turn["content"]}


def _label(record: dict[str, Any], column: str | None, default: str, option: str, where: str) -> str | None:
    """A short text that names a row or its category."""
    if column is not None and column not in record:
        raise _missing(column, option, record, where)
    value = record.get(column or default)
    if value is None or isinstance(value, (dict, list)):
        return None
    # A lone surrogate, which JSON can hold, fits into no file.
    return str(value).encode("utf-8", "backslashreplace").decode()


def _unsafe(record: dict[str, Any], column: str, where: str) -> bool:
    if column not in record:
        raise _missing(column, "--label-column", record, where)
    value = record[column]
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        # The value may be text of the row, so only its kind is told.
        shown = value if isinstance(value, (int, float)) else f"a {type(value).__name__}"
        raise DataError(
            f"{where}: column '{column}' holds {shown}, not a label; write true or 1 for an unsafe response, false or 0 for a safe "
            "one, or remove the row"
        )
    return bool(value)


def _missing(column: str, option: str, record: dict[str, Any], where: str) -> DataError:
    has = ", ".join(sorted(map(str, record))[:10]) or "none"
    return DataError(
        f"{where} has no column '{column}'; its columns are {has}: name another with {option}, or mend the row"
    )
