"""A YAML file and dotted overrides in, a checked `RunConfig` out.

An override is `key.to.value=VALUE`. VALUE is read as YAML where it is a number, true, false, null, a quoted
string, a [list] or a {mapping}; everything else is text, colons and hashes included. An override that
changes the `type` of a component (`generation.type=transformers`) starts that component afresh: what the
file said about the other type is dropped, and only the overrides apply, wherever they stand on the line.

`strategy: NAME` stands for the keys of `configs/strategies/NAME.yaml`; a key that the file or an override sets goes before.
"""

import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ballast.errors import ConfigError
from ballast.pipeline.config import RunConfig
from ballast.pipeline.config_problems import Problem, explain, report

_SHIPPED = importlib.resources.files("ballast") / "configs"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: a YAML file, or the bare name of a shipped one (`shipped_configs`).
        overrides: `a.b=c`, applied over the file; the module's docstring says how they are read.

    Raises:
        ConfigError: there is no such file, it is not YAML, or it does not make a run; the message lists
            every problem with its key, its value, the reason and what to write instead.
    """
    source, data = read_mapping(path)
    assignments, problems = split_overrides(overrides)
    problems += apply_overrides(data, assignments)
    problems += include_strategy(data)
    if problems:
        raise ConfigError(report(source, problems))
    _fill_default_types(data)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        given = {".".join(key) for key, _ in assignments}
        # Without the cause: the panel and the traceback show our words alone.
        raise ConfigError(report(source, explain(error, data, given))) from None


def shipped_configs() -> list[str]:
    """Names of the configurations inside the package, as `load_config` takes them."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def strategies() -> list[str]:
    """Names of the strategies that a configuration can include."""
    return sorted(entry.name.removesuffix(".yaml") for entry in (_SHIPPED / "strategies").iterdir())


def include_strategy(data: dict[str, Any]) -> list[Problem]:
    """Put the keys of the named strategy below those of `data`."""
    name = data.get("strategy")
    if name is None:
        return []
    if name not in strategies():
        return [
            Problem("strategy", name, "there is no such strategy", f"take one of {', '.join(strategies())}, or none")
        ]
    text = (_SHIPPED / "strategies" / f"{name}.yaml").read_text(encoding="utf-8")
    _add_below(data, _parse(f"strategies/{name}", text))
    return []


def _add_below(data: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    for key, value in defaults.items():
        if isinstance(value, Mapping) and data.get(key, {}) is None:  # a heading with nothing below it
            data[key] = {}
        if isinstance(value, Mapping) and isinstance(data.setdefault(key, {}), dict):
            _add_below(data[key], value)
        else:
            data.setdefault(key, value)


def config_hash(config: RunConfig) -> str:
    """sha256 over every value of a configuration, defaults included; the order of keys does not matter."""
    resolved = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(resolved.encode()).hexdigest()


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included; `load_config` reads it back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def read_mapping(path: str | Path) -> tuple[str, dict[str, Any]]:
    """What to call a YAML file in messages, and the mapping in it, not validated yet.

    Raises:
        ConfigError: there is no such file, or it holds no mapping.
    """
    source, text = _read(path)
    return source, _parse(source, text)


def _read(path: str | Path) -> tuple[str, str]:
    """What to call the file in messages, and its text."""
    file = Path(path).expanduser()
    name = str(path)
    try:
        if not file.is_file() and name in shipped_configs():
            return name, (_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
        return name, file.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = f", or the name of a shipped one: {', '.join(shipped_configs())}"
        raise ConfigError(
            f"configuration '{name}': there is no such file; give the path of a YAML file{hint}"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"configuration '{name}' is a folder; give the path of a YAML file in it") from None
    except PermissionError:
        raise ConfigError(f"configuration '{name}' may not be read by this user; change its permissions") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"configuration '{name}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


class _Loader(yaml.SafeLoader):
    """Plain YAML in which a key that is written twice is an error; YAML itself would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' is written twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _parse(source: str, text: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"configuration '{source}' is not YAML{where}: {error.problem}; mend that line") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration '{source}' is not YAML: {error}; save it as plain text") from None
    if data is None:
        raise ConfigError(
            f"configuration '{source}' is empty; start from a shipped one: ballast run demo --dry-run > {source}"
        )
    if not isinstance(data, dict):
        raise ConfigError(
            f"configuration '{source}' is a {type(data).__name__}, not a mapping; write lines of `key: value`"
        )
    return data


def read_value(text: str) -> Any:
    """One override's value: YAML where it looks like YAML, text otherwise; the module's docstring has the rule."""
    text = text.strip()
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        return value if text[0] in "'\"" else text  # `a #b` is text, not a comment
    if isinstance(value, (dict, list)):
        return value if text[0] in "[{" else text  # `You are: kind` is text, not a mapping
    return value if value is None or isinstance(value, (bool, int, float)) else text  # a date is text


def split_overrides(overrides: Sequence[str]) -> tuple[list[tuple[tuple[str, ...], Any]], list[Problem]]:
    """Dotted overrides as keys and values, and what is wrong with the others."""
    assignments: list[tuple[tuple[str, ...], Any]] = []
    problems = []
    for text in overrides:
        left, equals, right = text.partition("=")
        key = tuple(part.strip() for part in left.split("."))
        if equals and all(key):
            assignments.append((key, read_value(right)))
        else:
            problems.append(
                Problem(f"override '{text}'", None, "not of the form key=value", "write it like train.steps=10")
            )
    return assignments, problems


def apply_overrides(data: dict[str, Any], assignments: Sequence[tuple[tuple[str, ...], Any]]) -> list[Problem]:
    """Write the overrides into `data`; types first, outermost first, since a new type starts afresh."""
    problems = []
    for key, value in sorted(
        assignments, key=lambda item: (item[0][-1] != "type", len(item[0]) if item[0][-1] == "type" else 0)
    ):
        *sections, leaf = key
        place: Any = data
        for depth, section in enumerate(sections, start=1):
            if place.get(section) is None:  # absent, or a heading with nothing below it
                place[section] = {}
            place = place[section]
            if not isinstance(place, Mapping):
                name = ".".join(sections[:depth])
                problems.append(
                    Problem(
                        ".".join(key), value, f"'{name}' is the value {place!r}, not a section", f"set {name} itself"
                    )
                )
                break
        else:
            if leaf == "type" and place.get("type", value) != value:
                place.clear()
            place[leaf] = value
    return problems


def _fill_default_types(data: dict[str, Any]) -> None:
    """Give a component its default type where only other keys of it are set."""
    for name, field in RunConfig.model_fields.items():
        section, default = data.get(name), getattr(field.default, "type", None)
        if default is not None and isinstance(section, dict):
            section.setdefault("type", default)
