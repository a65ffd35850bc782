"""Suites: the prompts that a model is measured on.

A prompt has a kind. On `harmful` prompts a model should refuse; `scary` prompts sound harmful and are not, so
refusing them is over-refusal; `ordinary` prompts are everyday requests. The shipped suite comes with the
package; other suites are JSON-lines files of the same columns.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from ballast.errors import DataError

Kind = Literal["harmful", "scary", "ordinary"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_SHIPPED = "requests.jsonl"


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a suite.

    Attributes:
        id: unique in its suite; completions, verdicts and comparisons refer to it.
        prompt: the user's message.
        kind: harmful, scary or ordinary.
        category: the topic or the category of harm, in the suite's own words.
    """

    id: str
    prompt: str
    kind: Kind
    category: str


@dataclass(frozen=True)
class Suite:
    """A named list of prompts."""

    name: str
    prompts: tuple[SuitePrompt, ...]

    def of_kind(self, kind: Kind) -> tuple[SuitePrompt, ...]:
        """The prompts of one kind, in the suite's order."""
        return tuple(p for p in self.prompts if p.kind == kind)


def shipped_suite(split: Literal["train", "test"] = "test") -> Suite:
    """The suite that comes with the package; no prompt of `train` is in `test`.

    Raises:
        DataError: the package's data file is missing or damaged.
    """
    source = resources.files("ballast") / "data" / _SHIPPED
    if not source.is_file():
        raise DataError(f"the package holds no data/{_SHIPPED}; reinstall ballast-rl, or name a suite file of your own")
    with source.open(encoding="utf-8") as lines:
        return _read_suite(f"shipped-{split}", lines, f"ballast/data/{_SHIPPED}", split)


def load_suite(path: Path, split: str | None = None) -> Suite:
    """A suite from a JSON-lines file with the columns id, prompt, kind and category.

    Args:
        path: the file; its stem names the suite.
        split: keep only rows whose column `split` is this; None keeps every row.

    Raises:
        DataError: no such file, a line that is no such row, an id twice, or no row left.
    """
    if not path.is_file():
        raise DataError(f"suite '{path}': no such file; give a JSON-lines file with id, prompt, kind and category")
    with path.open(encoding="utf-8") as lines:
        return _read_suite(path.stem, lines, str(path), split)


def _read_suite(name: str, lines: Iterable[str], source: str, split: str | None) -> Suite:
    prompts: dict[str, SuitePrompt] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(line, f"{source}, line {number}")
        if split is not None and row.get("split") != split:
            continue
        prompt = _prompt(row, f"{source}, line {number}")
        if prompt.id in prompts:
            raise DataError(
                f"{source}, line {number}: id '{prompt.id}' stands there twice; give every prompt its own id"
            )
        prompts[prompt.id] = prompt
    if not prompts:
        what = f"no row with split '{split}'" if split else "no row"
        raise DataError(f"{source} holds {what}; a suite needs at least one prompt")
    return Suite(name, tuple(prompts.values()))


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON ({error.msg} at column {error.colno}); write one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}; write one object a line")
    return row


def _prompt(row: dict[str, Any], where: str) -> SuitePrompt:
    for column in ("id", "prompt", "kind", "category"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise DataError(
                f"{where}: '{column}' is missing or no text; a suite row needs id, prompt, kind and category"
            )
    if row["kind"] not in KINDS:
        raise DataError(f"{where}: kind '{row['kind']}' is none of {', '.join(KINDS)}; use one of them")
    return SuitePrompt(row["id"], row["prompt"], row["kind"], row["category"])
