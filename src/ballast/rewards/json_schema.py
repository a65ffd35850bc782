"""A JSON Schema validator for what a policy wrote: nothing is fetched, and no pattern runs without end."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import jsonschema
import referencing
import referencing.exceptions
import referencing.jsonschema
from jsonschema.validators import extend, validator_for

from ballast.rewards.matching import BoundedPattern

_pattern = cache(BoundedPattern)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Whether it is a JSON Schema that can be checked here.

    Raises:
        ValueError: it is no JSON Schema, has a pattern that is no regular expression, a reference that leads nowhere
            or to another document, or `patternProperties`.
    """
    try:
        validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        where = ".".join(map(str, error.absolute_path)) or "its top"
        raise ValueError(f"it is no JSON Schema ({error.message}, at {where}); mend it") from error
    resource = referencing.Resource.from_contents(schema, default_specification=referencing.jsonschema.DRAFT202012)
    resolver = referencing.Registry().with_resource("", resource).resolver()
    for key, value in _keywords(schema):
        if key == "patternProperties":
            raise ValueError(
                "patternProperties is not supported; name the properties, or set a pattern in propertyNames"
            )
        if key == "pattern" and isinstance(value, str):
            BoundedPattern(value)
        if key in ("$ref", "$dynamicRef") and isinstance(value, str):
            try:
                resolver.lookup(value)
            except referencing.exceptions.Unresolvable as error:
                raise ValueError(
                    f"the reference {value!r} leads nowhere, and other documents are not fetched; put what it refers to "
                    "below $defs and write #/$defs/NAME"
                ) from error


def _keywords(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a schema and of the schemas in it."""
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            yield key, value
            yield from _keywords(value)
    elif isinstance(schema, list):
        for part in schema:
            yield from _keywords(part)


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
