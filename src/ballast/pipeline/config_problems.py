"""What is wrong with a configuration, in words: the key, its value, the reason and what to write instead."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ballast.guardrails.registry import plugin_names
from ballast.pipeline.config import RunConfig

_SHOWN = 12  # problems that fit on a screen
_ABSENT = object()

# What a value has to be, by the kind that pydantic's error type begins with.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text (put quotes around it)",
    "tuple": "a list, such as [a, b]",
    "list": "a list, such as [a, b]",
    "dict": "a mapping",
    "finite": "a finite number",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        key: dotted key, or whatever else names the place.
        value: what stands there; None where there is nothing to show.
        why: the fact.
        remedy: what to write instead; may be empty where the fact says it.
    """

    key: str
    value: object
    why: str
    remedy: str = ""


def report(source: str, problems: Sequence[Problem]) -> str:
    """All problems of one configuration, on one screen."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"configuration '{source}' has {count}:"]
    for problem in problems[:_SHOWN]:
        head = problem.key if problem.value is None else f"{problem.key} = {_short(problem.value)}"
        lines += ["", head] if head else [""]
        lines.append("  " + "; ".join(part for part in (problem.why, problem.remedy) if part))
    if len(problems) > _SHOWN:
        lines += ["", f"... and {len(problems) - _SHOWN} more"]
    return "\n".join(lines)


def explain(
    error: ValidationError, data: Mapping[str, Any], overridden: AbstractSet[str] = frozenset()
) -> list[Problem]:
    """Every problem that validation found, in our words.

    Args:
        error: what `RunConfig.model_validate(data)` raised.
        data: what was validated.
        overridden: dotted keys that came from overrides, marked as such.
    """
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        path = _path(detail, data)
        key = _dotted(path)
        # A union reports once for each of its members; the first says enough.
        problems.setdefault(key or detail["msg"], _problem(detail, path, key, data, key in overridden))
    return list(problems.values())


def _path(detail: ErrorDetails, data: Any) -> tuple[str | int, ...]:
    """The keys of pydantic's location, without the tags that it puts between them for members of unions."""
    path: list[str | int] = []
    place = data
    for index, part in enumerate(detail["loc"]):
        last = index == len(detail["loc"]) - 1
        if isinstance(place, Mapping):
            if part in place or (last and detail["type"] == "missing"):
                path.append(part)
                place = place.get(part)
        elif isinstance(place, (list, tuple)) and isinstance(part, int) and part < len(place):
            path.append(part)
            place = place[part]
    return tuple(path)


def _dotted(path: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _problem(
    detail: ErrorDetails, path: tuple[str | int, ...], key: str, data: Mapping[str, Any], overridden: bool
) -> Problem:
    kind, context = detail["type"], detail.get("ctx", {})
    mark = " (override)" if overridden else ""
    field = _field(path, data)
    meaning = f"it means: {field.description}" if field is not None and field.description else ""
    value = _at(path, data)
    shown = None if value is _ABSENT or isinstance(value, Mapping) else ("nothing" if value is None else value)
    match kind:
        case "missing":
            return Problem(key, None, "missing, and it has no default", f"add it: {_needed(path, data)}")
        case "extra_forbidden":
            return Problem(key + mark, shown, "there is no such key", _nearest_key(path, data))
        case "union_tag_invalid":
            types, tag = _types(path, data), str(context.get("tag"))
            remedy = _nearest(tag, types)
            if tag in plugin_names():
                remedy = f"{tag} is a plug-in: write {key}.type=plugin {key}.name={tag}"
            return Problem(f"{key}.type{mark}", tag, f"no such type; there are {', '.join(types)}", remedy)
        case "union_tag_not_found" | "model_type" | "model_attributes_type" | "dict_type":
            return Problem(key + mark, shown, "a section was expected here", _section_remedy(key, value, path, data))
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", str(context.get("expected")))
            return Problem(key + mark, shown, f"must be one of {', '.join(allowed)}", _nearest(str(value), allowed))
        case "value_error" | "assertion_error":
            return Problem(key + mark, shown, str(context["error"]))
        case "invalid_key":
            return Problem(
                key,
                None,
                f"has the key {detail['loc'][-1]!r}, which YAML does not read as text",
                "put quotes around it, or remove it",
            )
        case "too_short" | "string_too_short":
            return Problem(key + mark, shown, f"must have at least {context.get('min_length')}", meaning)
        case "string_pattern_mismatch":
            return Problem(key + mark, shown, f"must match {context.get('pattern')}", meaning)
        case _ if kind in _BOUNDS:
            bound, word = _BOUNDS[kind]
            return Problem(key + mark, shown, f"must be {word} {context[bound]}", meaning)
        case _:
            wanted = _KINDS.get(kind.split("_")[0], "another kind of value")
            return Problem(key + mark, shown, f"must be {wanted}", meaning)


def _at(path: Sequence[str | int], data: Any) -> Any:
    for part in path:
        if isinstance(data, Mapping) and part not in data:
            return _ABSENT
        data = data[part]
    return data


def _members(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a field's annotation names, through unions and optionals."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _members(argument)


def _model(path: Sequence[str | int], data: Mapping[str, Any]) -> type[BaseModel] | None:
    """The model of the section at `path`; of a union, the member that the section's `type` names."""
    model: type[BaseModel] = RunConfig
    for depth, part in enumerate(path, start=1):
        field = model.model_fields.get(str(part))
        members = list(_members(field.annotation)) if field else []
        section = _at(path[:depth], data)
        chosen = section.get("type") if isinstance(section, Mapping) else None
        members = [m for m in members if len(members) == 1 or m.model_fields["type"].default == chosen]
        if not members:
            return None
        model = members[0]
    return model


def _field(path: Sequence[str | int], data: Mapping[str, Any]) -> FieldInfo | None:
    names = [part for part in path if isinstance(part, str)]
    model = _model(names[:-1], data) if names else None
    return model.model_fields.get(names[-1]) if model else None


def _types(path: Sequence[str | int], data: Mapping[str, Any]) -> list[str]:
    field = _field(path, data)
    return (
        [str(m.model_fields["type"].default) for m in _members(field.annotation) if "type" in m.model_fields]
        if field
        else []
    )


def _needed(path: Sequence[str | int], data: Mapping[str, Any]) -> str:
    """How a missing key is written: `model.name=...` for a section, with the meaning of a plain key."""
    key, field = _dotted(path), _field(path, data)
    types = _types(path, data)
    if types:
        return f"{key}.type, one of {', '.join(types)}"
    members = list(_members(field.annotation)) if field else []
    if members:
        return " and ".join(f"{key}.{name}" for name, inner in members[0].model_fields.items() if inner.is_required())
    return field.description if field and field.description else "a value"


def _section_remedy(key: str, value: object, path: Sequence[str | int], data: Mapping[str, Any]) -> str:
    types = _types(path, data)
    if isinstance(value, Mapping) and types:
        return f"set {key}.type to one of {', '.join(types)}"
    if value is None and types:
        return f"set {key}.type to one of {', '.join(types)}"
    if value is None:
        return "remove the empty heading, or write its keys below it"
    if types:
        return f"write {key}.type={value}" if value in types else f"set {key}.type to one of {', '.join(types)}"
    model = _model(path, data) if path else RunConfig
    return f"it holds the keys {', '.join(model.model_fields)}" if model else "write its keys below it"


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for member in _members(field.annotation):
            yield from _all_keys(member, f"{prefix}{name}.")


def _nearest_key(path: Sequence[str | int], data: Mapping[str, Any]) -> str:
    """Where an unknown key probably belongs: a neighbour of like name, else the same name in another section."""
    leaf, section = str(path[-1]), _model(path[:-1], data)
    here = list(section.model_fields) if section else []
    prefix = _dotted(path[:-1]) + "." if len(path) > 1 else ""
    near = difflib.get_close_matches(leaf, here, n=1, cutoff=0.7)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    elsewhere = list(dict.fromkeys(key for key in _all_keys(RunConfig) if key.rsplit(".", 1)[-1] == leaf))
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    return f"this section has {', '.join(here)}" if here else "remove it"


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else ""


def _short(value: object, width: int = 70) -> str:
    text = str(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
