"""Does the answer have the form that was asked for? Scorers that need no reference."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ballast.rewards.matching import BoundedPattern

_MAX_JSON_CHARACTERS = 100_000


class Format:
    """1 where a pattern is found; a completion above 20,000 characters, or on which it gives up, has no match.

    Args:
        pattern: regular expression.
        whole: it must match all of the completion, white space around it aside.
        ignore_case: whether case makes no difference.
    """

    def __init__(self, pattern: str, whole: bool = False, ignore_case: bool = False) -> None:
        self.pattern = BoundedPattern(pattern, ignore_case)
        self.whole = whole

    def __call__(self, text: str, reference: Any = None) -> float:
        return float(self.pattern.found(text.strip() if self.whole else text, self.whole))


class ValidJson:
    """1 where the completion is one JSON value, bare or in a ``` fence, and nothing else.

    NaN and Infinity are no JSON. A value nested too deeply to be read, or above 100,000 characters, gets 0.

    Args:
        required_keys: the value must be an object that holds them; `a.b` is the key `b` of the object `a`.
        schema: a JSON Schema that it must satisfy. References to other documents are not fetched.
    """

    def __init__(self, required_keys: Sequence[str] = (), schema: Mapping[str, Any] | None = None) -> None:
        self.required_keys = tuple(required_keys)
        self.schema = schema

    def __call__(self, text: str, reference: Any = None) -> float:
        text = _unfenced(text.strip())
        if len(text) > _MAX_JSON_CHARACTERS:
            return 0.0
        try:
            value = json.loads(text, parse_constant=_no_constant)
            return float(all(_has(value, key.split(".")) for key in self.required_keys) and self._fits(value))
        # Besides what is no JSON: numbers of thousands of digits, and nesting that the parser or the schema cannot follow.
        except (ValueError, RecursionError):
            return 0.0

    def _fits(self, value: Any) -> bool:
        return self.schema is None or bool(self._validator.is_valid(value))

    @cached_property
    def _validator(self) -> Any:
        from ballast.rewards.json_schema import bounded_validator

        return bounded_validator(self.schema)


def _unfenced(text: str) -> str:
    if not (text.startswith("```") and text.endswith("```") and "\n" in text):
        return text
    opening, _, rest = text.partition("\n")
    return rest[:-3] if opening.strip().casefold() in ("```", "```json") else text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _has(value: Any, path: Sequence[str]) -> bool:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True
