"""YAML as recipes use it, and `key.path=value` overrides on top of it.

PyYAML follows YAML 1.1, in which a key given twice silently keeps the last value and `1e-4` is text. Here the first is
a problem with its line, the second a number, as everyone expects.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from aqtx.errors import InputError

_MOST_ALIASES = 20  # of ten nodes each, nested, they would stand for 100 nodes; bombs need many more


class _Loader(yaml.SafeLoader):
    """The safe loader, plus a list of duplicate keys."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []
        self._aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """SafeLoader's node; a text that repeats itself by ever more aliases is refused before it is unfolded."""
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > _MOST_ALIASES:
                raise yaml.YAMLError(f"it holds more than {_MOST_ALIASES} aliases")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """SafeLoader's mapping; keys that stand twice are remembered, keys merged in by `<<` do not count."""
        seen: set[str] = set()
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in scalars:
            if key.value in seen:
                self.duplicates.append(f"line {key.start_mark.line + 1}: the key {key.value!r} stands here twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.2's floats: `1e-4` without a dot or a sign in the exponent.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The plain value of a YAML text; syntax errors and duplicate keys raise one sentence each, with their lines."""
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise InputError(f"{place}: not valid YAML: {error.problem or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if loader.duplicates:
        raise InputError(*(f"{where}, {problem}" for problem in loader.duplicates))
    return value


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["passes.1.assign_plan.average_bits=4.5", ...]` -> dotted keys and their YAML values."""
    parsed: dict[str, Any] = {}
    problems: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            problems.append(f"{word!r} is not an override; write key.path=value, for example seed=1")
            continue
        try:
            parsed[key.strip()] = parse_yaml(text, f"override {key.strip()}")
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(*problems)
    return parsed


def apply_overrides(document: dict[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """Set each dotted key in the document, making sections that are not there; returns what could not be set."""
    problems: list[str] = []
    for key, value in overrides.items():
        try:
            _set(document, key.split("."), value)
        except InputError as error:
            problems.extend(f"override {key}: {problem}" for problem in error.problems)
    return problems


def _set(node: Any, path: list[str], value: Any) -> None:
    for part, following in itertools.pairwise(path):
        node = _descend(node, part, following)
    _put(node, path[-1], value)


def _descend(node: Any, part: str, following: str) -> Any:
    """The child named `part`, made where it is missing."""
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        child = node[int(part)]
    else:
        child = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, list) and child == following:
        child = {following: {}}  # a pass written as its bare name is about to get a field
    elif child is None:
        child = {}
    _put(node, part, child)
    return child


def _put(node: Any, part: str, value: Any) -> None:
    if isinstance(node, dict):
        node[part] = value
    elif not isinstance(node, list):
        raise InputError(f"{part!r} has no place inside {node!r}")
    elif not part.isdecimal() or int(part) > len(node):
        raise InputError(f"{part!r} is not an index of this list, which has {len(node)} entries, the first of them 0")
    else:
        node[int(part) : int(part) + 1] = [value]  # one past the end appends
