"""Plain YAML values -> a typed dataclass, with every problem found in one go.

A dataclass is its own schema: its fields are the allowed keys, their annotations the types, their defaults the
defaults. The annotations understood are those that a recipe needs: bool, int, float, str, None, Literal, names of a
table (`aqtx.registry.OneOf`), unions, tuples, lists, mappings with text keys, Any and nested dataclasses. A value is
never coerced into another kind, save an integer into a number and a YAML list into a tuple: `seed: "7"` is an error,
not a guess.
"""

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union

from aqtx.errors import InputError, nearest

T = TypeVar("T")

_LARGEST = 2**63
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    types.NoneType: "null",
    Any: "any value",
}


def parse_fields(cls: type[T], values: Mapping[str, Any], where: str) -> tuple[T | None, list[str]]:
    """Build `cls` from `values`; `where` is the dotted place that the problems name.

    Returns the instance and no problems, or None and all problems.

    >>> parse_fields(Recipe, {"sed": 1}, "")
    (None, ["sed: unknown key, did you mean 'seed'?", ...])
    """
    problems: list[str] = []
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            problems.append(f"{join(where, key)}: unknown key{nearest(str(key), fields) or _listing(fields)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    built: dict[str, Any] = {}
    for name, field in fields.items():
        if name in values:
            built[name] = _read(values[name], hints[name], join(where, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{join(where, name)}: this key is required")
    if problems:
        return None, problems
    try:
        return cls(**built), []
    except InputError as error:  # the dataclass refuses its own values
        return None, [f"{where}: {problem}" if where else problem for problem in error.problems]


def plain(value: Any) -> Any:
    """A dataclass, tuple or mapping as the plain lists and dicts that YAML and JSON write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def join(where: str, key: object) -> str:
    """The dotted place of `key` inside `where`; this is also how a command-line override spells it."""
    return f"{where}.{key}" if where else str(key)


def _listing(names: Mapping[str, Any]) -> str:
    return f"; the keys here are {', '.join(names)}" if names else "; there are no keys here"


def _read(value: Any, kind: Any, where: str, problems: list[str]) -> Any:
    """The value as `kind` wants it; on a mismatch a sentence goes into `problems` and the result is meaningless."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(value, kind, where, problems)
    reader = _READERS.get(origin)
    if reader is not None:
        return reader(value, kind, where, problems)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_dataclass(value, kind, where, problems)
    return _read_scalar(value, kind, where, problems)


def _read_scalar(value: Any, kind: Any, where: str, problems: list[str]) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if kind is str and isinstance(value, os.PathLike):  # from Python; YAML has none
        value = os.fspath(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{where}: expected a finite number, got {value}")
    elif type(value) is int and not -_LARGEST <= value < _LARGEST:
        problems.append(f"{where}: expected a number that 64 bits hold, got {_quote(value)}")
    elif type(value) is not kind:  # exact: true is not the integer 1
        problems.append(f"{where}: expected {describe(kind)}, got {_quote(value)}")
    return value


def _read_union(value: Any, kind: Any, where: str, problems: list[str]) -> Any:
    arms = typing.get_args(kind)
    for arm in arms:
        found: list[str] = []
        read = _read(value, arm, where, found)
        if not found:
            return read
        if _same_shape(value, arm):  # a mapping for a mapping: say what is wrong inside it, not "expected a mapping"
            problems.extend(found)
            return None
    wording = describe(kind)
    hint = nearest(value, _literals(arms)) if isinstance(value, str) else ""
    problems.append(f"{where}: expected {wording}, got {_quote(value)}{hint}")
    return None


def _same_shape(value: Any, arm: Any) -> bool:
    if isinstance(value, Mapping):
        return dataclasses.is_dataclass(arm) or typing.get_origin(arm) is dict
    return isinstance(value, (list, tuple)) and typing.get_origin(arm) in (tuple, list)


def _literals(arms: tuple[Any, ...]) -> list[str]:
    return [str(choice) for arm in arms if typing.get_origin(arm) is Literal for choice in typing.get_args(arm)]


def _read_literal(value: Any, kind: Any, where: str, problems: list[str]) -> Any:
    choices = typing.get_args(kind)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        hint = nearest(value, [str(choice) for choice in choices]) if isinstance(value, str) else ""
        problems.append(f"{where}: expected {describe(kind)}, got {_quote(value)}{hint}")
    return value


def _read_sequence(value: Any, kind: Any, where: str, problems: list[str]) -> Any:
    container, arms = typing.get_origin(kind), typing.get_args(kind)
    if not isinstance(value, (list, tuple)):
        problems.append(f"{where}: expected {describe(kind)}, got {_quote(value)}")
        return value
    fixed = container is tuple and arms[-1] is not Ellipsis
    if fixed and len(value) != len(arms):
        problems.append(f"{where}: expected {len(arms)} values, got {len(value)}")
        return value
    kinds = arms if fixed else (arms[0],) * len(value)
    items = [_read(item, arm, join(where, i), problems) for i, (item, arm) in enumerate(zip(value, kinds, strict=True))]
    return tuple(items) if container is tuple else items


def _read_mapping(value: Any, kind: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected {describe(kind)}, got {_quote(value)}")
        return value
    if wrong := [key for key in value if not isinstance(key, str)]:
        problems.append(f"{where}: keys must be text, not {_quote(wrong[0])}; put it in quotes")
        return value
    arm = typing.get_args(kind)[1]
    return {key: _read(item, arm, join(where, key), problems) for key, item in value.items()}


def _read_dataclass(value: Any, kind: type, where: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{where}: expected {describe(kind)}, got {_quote(value)}")
        return value
    read, found = parse_fields(kind, value, where)
    problems.extend(found)
    return read


def _read_named(value: Any, kind: Any, where: str, problems: list[str]) -> Any:
    return _read_literal(value, _choices(kind), where, problems)


def _choices(kind: Any) -> Any:
    """`Annotated[str, OneOf(...)]` as the Literal of the names that the table holds now."""
    return Literal[tuple(sorted(kind.__metadata__[0].names()))]


_READERS: dict[Any, Callable[[Any, Any, str, list[str]], Any]] = {
    Literal: _read_literal,
    Annotated: _read_named,
    tuple: _read_sequence,
    list: _read_sequence,
    dict: _read_mapping,
}


def describe(kind: Any) -> str:
    """A type in the user's words: `int | None` is "an integer or null"."""
    if typing.get_origin(kind) is Annotated:
        kind = _choices(kind)
    origin, arms = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arm) for arm in arms)
    if origin is Literal:
        return ("one of " if len(arms) > 1 else "") + ", ".join(str(arm) for arm in arms)
    if origin in (tuple, list):
        return "a list of " + ", ".join(describe(arm) for arm in arms if arm is not Ellipsis)
    if origin is dict:
        return f"a mapping to {describe(arms[1])}"
    if dataclasses.is_dataclass(kind):
        return "a mapping with the keys " + ", ".join(field.name for field in dataclasses.fields(kind))
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _quote(value: Any) -> str:
    """The value as it might stand in the recipe, shortened."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
