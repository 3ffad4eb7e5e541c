"""Strict configuration: frozen dataclasses from YAML plus overrides, unknown keys refused."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import pydantic
import yaml

from hrmtext.errors import ConfigError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config_class(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass whose fields are type-checked when built."""
    decorate = pydantic.dataclasses.dataclass(
        frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid")
    )
    return typing.cast("type[T]", decorate(cls))


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build config `cls` from a nested mapping.

    Args:
        values: plain YAML/JSON values, nested as the dataclass is.
        where: the file or command line that `values` came from, named in errors.

    Raises:
        ConfigError: an unknown key (with the nearest match), a wrong type, or a value that
            the class itself refuses.
    """
    _refuse_unknown_keys(cls, values, where, prefix="")
    try:
        return cls(**values)
    except pydantic.ValidationError as error:
        lines = "\n".join(f"  {_describe(issue)}" for issue in error.errors())
        raise ConfigError(f"{where}: invalid configuration\n{lines}") from None


def to_mapping(config: Any) -> dict[str, Any]:
    """The config as plain nested values (tuples become lists) that `build` reads back equal."""
    return _plain(dataclasses.asdict(config))


def load(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read config `cls` from a YAML file (None: all defaults), then apply overrides.

    Values of overrides are parsed as YAML, so `lr=3e-4`, `data.epochs=2`, `families=[a, b]` work.

    Raises:
        ConfigError: file missing or not YAML, an override without `=`, or anything `build` refuses.
    """
    values = read_values(path, overrides)
    return build(cls, values, where=str(path) if path is not None else "overrides")


def read_values(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values that `load` builds from: a YAML file's, and the overrides laid over them.

    Raises:
        ConfigError: file missing or not YAML, or an override without `=`.
    """
    values: dict[str, Any] = read_yaml(path) if path is not None else {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"override {override!r} is not of the form key=value, for example lr=3e-4"
            )
        node = values
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
            node = child
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or error
            raise ConfigError(f"override {override!r}: {text!r} is no value: {problem}") from None
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping; ConfigError otherwise."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(values).__name__}")
    return values


def dump_yaml(config: Any) -> str:
    """The resolved config as YAML, in field order."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)


def nearest(word: str, options: Sequence[str]) -> str:
    """`; perhaps you meant 'x'` where an option is close to `word`, else the list of options."""
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"; perhaps you meant {close[0]!r}"
    return f"; known: {', '.join(sorted(options))}"


def _describe(issue: Any) -> str:
    own = issue.get("ctx", {}).get("error")
    if own is not None:  # raised by the class itself, which names the field
        return str(own)
    place = ".".join(str(part) for part in issue["loc"])
    return f"{place}: {issue['msg']} (got {issue['input']!r})"


def _refuse_unknown_keys(cls: type, values: Mapping[str, Any], where: str, prefix: str) -> None:
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(
                f"{where}: unknown key {prefix + str(key)!r}{nearest(str(key), list(hints))}"
            )
        nested = _dataclass_of(hints[key])
        if nested is not None and isinstance(value, Mapping):
            _refuse_unknown_keys(nested, value, where, prefix=f"{prefix}{key}.")


def _dataclass_of(hint: Any) -> type | None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((o for o in options if dataclasses.is_dataclass(o) and isinstance(o, type)), None)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
