"""A JSON Schema validator for what a policy wrote: nothing is fetched, and no pattern runs without end."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import jsonschema
import referencing
from jsonschema.validators import extend, validator_for

from ballast.rewards.matching import BoundedPattern

_pattern = cache(BoundedPattern)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Whether it is a JSON Schema at all.

    Raises:
        ValueError: it is none; names the place in it.
    """
    try:
        validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        where = ".".join(map(str, error.absolute_path)) or "its top"
        raise ValueError(f"it is no JSON Schema ({error.message}, at {where}); mend it") from error
    if "patternProperties" in str(schema):
        raise ValueError("patternProperties is not supported; name the properties, or use propertyNames with a pattern")


def bounded_validator(schema: Any) -> Any:
    """A validator of the schema's own draft, 2020-12 where it names none.

    `pattern` is searched within the time of `BoundedPattern`, and what it cannot decide does not match; a reference
    to another document is an error and is not followed.
    """
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    # An empty registry: the default one would open the address of a reference.
    return extend(kind, {"pattern": _matches})(schema, registry=referencing.Registry())


def _matches(_: Any, pattern: str, value: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, str) and not _pattern(pattern).found(value):
        yield jsonschema.ValidationError("the text does not match the pattern")
