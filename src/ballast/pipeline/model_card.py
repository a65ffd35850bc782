"""Model cards: a README.md beside the weights that says what a model is, what it was made from, and how safe it was found.

The front matter is written by huggingface_hub, so that a folder can be pushed as it is. A card ends with a line that holds
its own sha256: a README.md without that line, or edited since, belongs to the user and is left alone. No card names a
folder of this machine.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ballast.guardrails.licences import APACHE, Licence, licence_of_model
from ballast.models import EMBEDDED_MODEL
from ballast.pipeline.run_folder import write_text
from ballast.pipeline.template_contract import TemplateContract

CARD = "README.md"
_MARK = "<!-- Written by Ballast, which leaves this file alone once it is edited; sha256 of the text above: "
_EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

_LIMITS = (
    "The figures hold for the prompts they were measured on, under the prompt format above. Another system prompt or another "
    "chat template makes another model of it, and often a less safe one.",
    "Unsafe is what a guardrail model calls unsafe, and a refusal is recognised by its words; both err. Measure it on prompts of "
    "your own, and let people read its answers, before others use it.",
    "Nothing was measured about attacks (jailbreaks, adversarial suffixes), about conversations of several turns, other "
    "languages or tools, unless a section above says so. Fine-tuning it further can undo its safety.",
)


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        title: the heading.
        summary: one paragraph below it.
        base_model: what it was made from: a hub id, `embedded:...` or a folder, of which only the last part is told.
        revision: commit or tag of a hub id.
        datasets: names of data sets for the front matter, hub ids alone.
        sections: text by heading, in order.
    """

    title: str
    summary: str
    base_model: str
    revision: str | None = None
    datasets: Sequence[str] = ()
    sections: Mapping[str, str] = field(default_factory=dict)


def write_card(folder: Path, card: Card) -> bool:
    """Write the card of a model folder, whole or not at all.

    Returns:
        False where a README.md that is not Ballast's, or was edited since, is left alone.
    """
    path = folder / CARD
    if path.exists() and not is_ours(path):
        return False
    text = render(card)
    write_text(path, f"{text}\n{_MARK}{_digest(text)} -->\n")
    return True


def is_ours(path: Path) -> bool:
    """Whether Ballast wrote the card and nobody has changed it."""
    try:
        text, mark, rest = path.read_text(encoding="utf-8").rpartition(f"\n{_MARK}")
    except (OSError, UnicodeDecodeError):
        return False
    return bool(mark) and rest == f"{_digest(text)} -->\n"


def render(card: Card) -> str:
    """The card as Markdown with a front matter; ends with a line end."""
    from huggingface_hub import ModelCardData

    name, licence = shown_model(card.base_model), licence_of_model(card.base_model)
    on_hub = hub_id(card.base_model)
    data = ModelCardData(
        base_model=on_hub,
        library_name="transformers",
        pipeline_tag="text-generation",
        license="apache-2.0" if licence == APACHE else None,
        datasets=list(card.datasets) or None,
        tags=["ballast", "safety"],
    )
    revision = f" at `{card.revision}`" if card.revision else ""
    base = f"`{name}`{revision}, under the licence {_licence(licence)}"
    sections = {"Base model": base, **card.sections, "Limits": "\n".join(f"- {line}" for line in _LIMITS)}
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    return f"---\n{data.to_yaml()}\n---\n\n# {card.title}\n\n{card.summary}\n\n{body}\n"


def shown_model(name: str) -> str:
    """A model's name as others may read it: of a folder its last part, since the way there is this machine's own."""
    return hub_id(name) or (Path(name).expanduser().name or name)


def hub_id(name: str) -> str | None:
    """The hub id that a model's name is; None for a folder."""
    if name == EMBEDDED_MODEL:
        return _EMBEDDED_ON_HUB
    path = Path(name).expanduser()
    local = path.is_dir() or path.is_absolute() or name.startswith(".") or name.count("/") != 1
    return None if local else name


def prompt_format_section(contract: TemplateContract) -> str:
    """Under which prompt format the model is what the card says."""

    def shown(prompt: str | None) -> str:
        if prompt is None:
            default = contract.default_system_prompt
            return (
                "none; the chat template writes none"
                if default is None
                else f"the chat template's own, {_code(default)}"
            )
        return _code(prompt)

    lines = [f"System prompt in training: {shown(contract.system_prompt)}"]
    if contract.policy == "ptst":
        lines.append(f"Served with another one (policy ptst): {shown(contract.serving_system_prompt)}")
    lines.append(f"Fingerprint of the template contract: `{contract.fingerprint()}`")
    lines.append(
        "`ballast serve` on this folder checks the contract in `prompt_format.json`, which holds the token ids of fixed "
        "conversations, and puts a guardrail in front of the model"
    )
    return "\n".join(f"- {line}" for line in lines)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _licence(licence: Licence) -> str:
    return licence.name if licence.as_reward != "unknown" else f"{licence.name} to Ballast (read its own card)"


def _code(text: str) -> str:
    # A fence longer than any run of backticks inside, on one line.
    ticks = "`" * (max((len(run) for run in _runs(text)), default=0) + 1)
    return f"{ticks} {' '.join(text.split())} {ticks}"


def _runs(text: str) -> list[str]:
    return "".join(c if c == "`" else " " for c in text).split()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
