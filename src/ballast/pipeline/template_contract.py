"""The template contract: how conversations become token ids, as data that can be written down and compared.

A model is safe under the template that it was trained with. The contract holds that template, and the token ids of fixed
probe conversations, which differ as soon as anything does that turns text into ids. It stands beside weights, in
checkpoints and in stages (`model_record`), and is compared at every place where a conversation is encoded anew.

Two policies say which system prompt is served. `consistent`: that of the training. `ptst` (pure tuning, safe testing;
arXiv 2402.18540): trained without a safety prompt, served with one; everything else stays the same.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Policy = Literal["consistent", "ptst"]
Decode = Callable[[Sequence[int]], str]

_CONTEXT = 30  # characters shown on each side of a difference
_LONGEST = 60  # characters shown of a difference itself
# What the ids follow from is shown as text; the ids themselves only where nothing else explains them.
_PROBES = ("probes", "serving_probes")
_SERVING = ("policy", "serving_system_prompt", "serving_probes")


@dataclass(frozen=True)
class TemplateContract:
    """How conversations become token ids.

    Attributes:
        chat_template: the Jinja source.
        special_tokens: text and id of every special token.
        stop_tokens: those that end an answer: the tokenizer's own, and the generation config's beside it.
        generation_prompt: what the template writes where the assistant begins.
        default_system_prompt: what the template says as the system where a conversation does not; None for nothing, or for
            a template that does not keep the system message apart.
        system_prompt: of training; None leaves it to the template's default.
        probes: ids of the probe conversations under it; the name of an error where the template refuses one.
        policy: whether the same is served.
        serving_system_prompt: what is served.
        serving_probes: ids of the probe conversations under it.
    """

    chat_template: str
    special_tokens: Mapping[str, int]
    stop_tokens: Mapping[str, int]
    generation_prompt: str
    default_system_prompt: str | None
    system_prompt: str | None
    probes: Mapping[str, list[int] | str]
    policy: Policy
    serving_system_prompt: str | None
    serving_probes: Mapping[str, list[int] | str]

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "TemplateContract":
        """A contract from what `to_json` gave.

        Raises:
            KeyError: a part is missing.
            TypeError: it is no mapping.
        """
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def fingerprint(self) -> str:
        """sha256 over all parts, the token ids of the probes among them."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def served_system_prompt(self) -> str | None:
        """The system prompt that a served conversation has, the template's default included."""
        return self.default_system_prompt if self.serving_system_prompt is None else self.serving_system_prompt


def differences(
    contract: TemplateContract, found: TemplateContract, decode: Decode | None = None, serving: bool = True
) -> list[str]:
    """What differs, a paragraph each, with the changed characters marked.

    Args:
        contract: what must hold.
        found: what is there.
        decode: text of token ids, special tokens included, for probes that differ.
        serving: compare what is served, too; training and measuring under other serving prompts is the same training.
    """
    told: list[str] = []
    for field in fields(TemplateContract):
        ours, theirs = getattr(contract, field.name), getattr(found, field.name)
        if ours == theirs or (field.name in _SERVING and not serving) or field.name in _PROBES:
            continue
        if isinstance(ours, Mapping):
            told += _token_differences(field.name, ours, theirs)
        else:
            told.append(text_difference(field.name, ours, theirs))
    for name in () if told else (_PROBES if serving else _PROBES[:1]):
        told += probe_differences(getattr(contract, name), getattr(found, name), decode)
    return told


def text_difference(name: str, contract: str | None, found: str | None) -> str:
    """The place where two texts part, with the characters around it and a mark under those that differ."""
    if contract is None or found is None:
        ours, theirs = (
            "none" if text is None else f"'{_visible(_shorten(text, _LONGEST))}'" for text in (contract, found)
        )
        return f"{name}: {ours} in the contract, {theirs} here"
    start, ours, theirs = _changed(contract, found)
    before = ("…" if start > _CONTEXT else "") + _visible(contract[max(0, start - _CONTEXT) : start])
    rows = []
    for text, part in ((contract, ours), (found, theirs)):
        after = text[start + len(part) :]
        shown = _visible(_shorten(part, _LONGEST))
        rows.append((shown, before + shown + _visible(after[:_CONTEXT]) + ("…" if len(after) > _CONTEXT else "")))
    width = max(1, *(len(shown) for shown, _ in rows))
    line = contract.count("\n", 0, start) + 1
    return (
        f"{name} differs at character {start + 1} (line {line}): {_points(ours)} in the contract, {_points(theirs)} here\n"
        f"    contract  {rows[0][1]}\n    here      {rows[1][1]}\n              {' ' * len(before)}{'^' * width}"
    )


def probe_differences(
    contract: Mapping[str, Sequence[int] | str], found: Mapping[str, Sequence[int] | str], decode: Decode | None = None
) -> list[str]:
    """The first probe conversation whose ids differ, and how many others do."""
    unlike = [name for name in sorted(contract.keys() | found.keys()) if contract.get(name) != found.get(name)]
    if not unlike:
        return []
    name = unlike[0]
    ours, theirs = contract.get(name), found.get(name)
    told = _ids_difference(f"probe conversation '{name}'", ours, theirs, decode)
    return [told + (f"\n    ({len(unlike) - 1} more probe conversations differ)" if len(unlike) > 1 else "")]


def _ids_difference(name: str, ours: Any, theirs: Any, decode: Decode | None) -> str:
    if isinstance(ours, str | None) or isinstance(theirs, str | None):
        said = ["not there" if v is None else v if isinstance(v, str) else f"{len(v)} tokens" for v in (ours, theirs)]
        return f"{name}: {said[0]} in the contract, {said[1]} here"
    if decode is not None and decode(ours) != decode(theirs):
        return text_difference(f"{name}, as text,", decode(ours), decode(theirs))
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return (
        f"{name} has other token ids for the same text, from token {at + 1} on: {list(ours[at : at + 6])} in the contract, "
        f"{list(theirs[at : at + 6])} here"
    )


def _token_differences(name: str, contract: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    told = []
    lost = {token: number for token, number in contract.items() if found.get(token) != number}
    new = {token: number for token, number in found.items() if contract.get(token) != number}
    renamed = {number: token for token, number in new.items()}
    for token, number in lost.items():
        if number in renamed:  # the same id under another name
            told.append(text_difference(f"{name}, id {number},", token, renamed[number]))
            new.pop(renamed[number])
        else:
            told.append(f"{name}: '{_visible(token)}' (id {number}) is in the contract and not here")
    told += [
        f"{name}: '{_visible(token)}' (id {number}) is here and not in the contract" for token, number in new.items()
    ]
    return told


def _changed(one: str, other: str) -> tuple[int, str, str]:
    """Where two texts part, and what each has between what they share at both ends."""
    shortest = min(len(one), len(other))
    start = next((i for i in range(shortest) if one[i] != other[i]), shortest)
    end = next((i for i in range(shortest - start) if one[-1 - i] != other[-1 - i]), shortest - start)
    return start, one[start : len(one) - end], other[start : len(other) - end]


def _visible(text: str) -> str:
    # A newline, a zero-width space or a control character would be invisible in a terminal, or worse.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-longest // 2 :]}"


def _points(text: str) -> str:
    """Code points, for letters that look the same."""
    if not text:
        return "nothing"
    return " ".join(f"U+{ord(c):04X}" for c in text) if len(text) <= 3 else f"{len(text)} characters"
