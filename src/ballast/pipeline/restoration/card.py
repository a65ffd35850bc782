"""The card of a model that was repaired from weights alone, as far as the repair itself knows it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ballast.pipeline.model_card import Card, prompt_format_section
from ballast.pipeline.model_record import read_contract


def restoration_card(name: str, record: Mapping[str, Any], folder: Path) -> Card:
    """What is known without the run that a model is from: the repair and its inputs, and the contract that came along.

    Args:
        name: of the model.
        record: what `restoration.json` holds.
        folder: of the model, with the record of its prompt format if it has one.
    """
    inputs = {label: Path(str(one["folder"])).name for label, one in record["inputs"].items()}
    contract = read_contract(folder)
    return Card(
        title=name,
        summary="A model repaired from weights alone by [Ballast](https://github.com/ballast-rl/ballast), without training.",
        base_model=str(record["inputs"].get("tuned", record["inputs"]["aligned"])["folder"]),
        sections={
            "Made by": "\n".join(f"- {line}" for line in repair_lines(record)),
            "Made from": "\n".join(f"- {label}: `{model}`" for label, model in inputs.items())
            + "\n\nData, guards and licences are those of these models; `restoration.json` has the sha256 of every file read.",
            "Measured": "Not measured: too strong a repair breaks the language, and too weak a one changes nothing. Measure safety, "
            "refusals of harmless requests and the task before anyone relies on it.",
            "Prompt format": "The tuned model had no template contract, so none is known."
            if contract is None
            else prompt_format_section(contract),
        },
    )


def repair_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """What `restoration.json` says was done, in words."""
    settings = ", ".join(f"{k} {v}" for k, v in record["settings"].items() if isinstance(v, (int, float, str)))
    yield f"Repaired by {record['method']} ({settings}): {len(record['changed'])} tensors changed"
    yield from record["notes"]
