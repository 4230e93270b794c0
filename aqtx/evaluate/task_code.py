"""Task files of lm-eval that run code, found without running it.

A task file may name Python functions (`!function file.name`), take more lines from another file (`include`), name a
metric or a data set that is a script, and its templates may reach Python's insides through double underscores.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from aqtx.errors import InputError

_FUNCTION = "!function"
_LOADED = ("metric", "dataset_path")  # keys whose value may be a script
_MOST_FILES = 20_000


def refuse_code(folder: Path) -> None:
    """Refuse task files that run Python.

    Raises:
        InputError: names each file and what it runs.
    """
    found: dict[Path, str] = {}
    for file in _task_files(folder):
        _look(file, found)
    if problems := [f"{file}: {what}" for file, what in found.items() if what]:
        more = [f"and {len(problems) - 5} more files"] if len(problems) > 5 else []
        raise InputError(
            *problems[:5], *more, "these task files run code: give --allow-task-code if you trust whoever wrote them"
        )


def _task_files(folder: Path) -> Iterator[Path]:
    files = [file for pattern in ("*.yaml", "*.yml") for file in folder.rglob(pattern) if file.is_file()]
    if len(files) > _MOST_FILES:
        raise InputError(f"{folder} holds more than {_MOST_FILES:,} task files; name a smaller folder")
    yield from sorted(files)


def _look(file: Path, found: dict[Path, str]) -> None:
    """What a file and those that it includes run; an empty text for nothing."""
    file = file.resolve()
    if file in found:
        return
    found[file] = ""
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        text = file.read_bytes().decode(errors="replace") if file.is_file() else ""
        found[file] = f"holds {_FUNCTION}" if _FUNCTION in text else ""
        return
    for key, child in _scalars(node):
        value = child.value if isinstance(child.value, str) else ""
        if child.tag.startswith("!") or _FUNCTION in child.tag:
            found[file] = found[file] or f"line {child.start_mark.line + 1} runs {child.tag} {value}"
        elif "__" in value and ("{{" in value or "{%" in value):
            found[file] = found[file] or f"line {child.start_mark.line + 1}: a template reaches into Python"
        elif key in _LOADED and (value.endswith(".py") or (key == "metric" and _is_path(value, file))):
            found[file] = found[file] or f"line {child.start_mark.line + 1}: the {key} {value!r} is a script"
        elif key == "trust_remote_code" and value.lower() in ("true", "yes", "on"):
            found[file] = found[file] or f"line {child.start_mark.line + 1} trusts remote code"
        elif key == "include" and value:
            _look(file.parent / value, found)


def _is_path(value: str, file: Path) -> bool:
    return "/" in value or (file.parent / value).exists() or Path(value).is_dir()


def _scalars(root: yaml.Node | None) -> Iterator[tuple[str, Any]]:
    """(key that it stands under, node) of every scalar and of every tagged node; each node once."""
    waiting, seen = [("", root)], set()
    while waiting:
        key, node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            waiting += [("", name) for name, _ in node.value]
            waiting += [(str(name.value), value) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(key, value) for value in node.value]
        if isinstance(node, yaml.ScalarNode) or node.tag.startswith("!"):
            yield key, node
