"""The recipe: what one run does, as typed values.

A recipe is a YAML file whose sections are the dataclasses below and whose `passes` are those of the registry: every key
is a field, every default a field's default, and whatever does not fit is reported at once with its dotted place.
Relative paths are relative to the current directory, since the same recipe serves from anywhere.
"""

import copy
import importlib
import os
import pkgutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import aqtx.passes
from aqtx import registry
from aqtx.errors import InputError, nearest
from aqtx.evaluate.spec import EvaluateSpec
from aqtx.machine.memory import bytes_of
from aqtx.planning.arms import StudySpec
from aqtx.registry import Pass
from aqtx.runs.yaml_text import apply_overrides, parse_overrides, parse_yaml
from aqtx.schema import join, parse_fields, plain
from aqtx.text.calibration_spec import CalibrationSpec

_MOST_CHARACTERS = 1_000_000  # PyYAML takes seconds for so much
SHIPPED = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model. `source` is a shipped name, a local folder or a hub name; `dtype` is that of the graphs."""

    source: str
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, validated."""

    version: Literal[1]
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelSpec
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    output: str | None = None
    passes: tuple[Pass, ...] = ()
    evaluate: EvaluateSpec | None = None
    report: bool = True
    max_memory: int | str | None = None  # of the whole process: bytes or such as 8GiB; null takes what is free
    study: StudySpec | None = None  # read by `aqtx study` only

    def __post_init__(self) -> None:
        """Refuse a size that is none, and a seed that no generator takes."""
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed: must be 0 or more and below 2^63, got {self.seed}")
        if self.memory_limit is not None and self.memory_limit < 1:
            raise InputError(f"max_memory: must be at least 1 byte, got {self.max_memory}")

    @property
    def memory_limit(self) -> int | None:
        """`max_memory` in bytes."""
        try:
            return bytes_of(self.max_memory) if isinstance(self.max_memory, str) else self.max_memory
        except ValueError as error:
            raise InputError(f"max_memory: {error}") from None

    def resolved(self) -> dict[str, Any]:
        """Every value with its default written out; without output path and memory, which decide no result: equal runs
        read equal anywhere.
        """
        kept = [item.name for item in fields(self) if item.name not in ("output", "max_memory")]
        document = {name: plain(getattr(self, name)) for name in kept}
        return document | {"passes": [{step.name: plain(step)} if fields(step) else step.name for step in self.passes]}


def load_recipe(source: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe from a YAML file or by its shipped name, with overrides: `key.path=value` words or a mapping.

    Raises:
        InputError: with one sentence for every problem of the recipe and its overrides.
    """
    path = find_recipe(source)
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(_MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from None
    if len(text) > _MOST_CHARACTERS:
        raise InputError(f"{path}: a recipe of more than {_MOST_CHARACTERS:,} characters is none")
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        raise InputError(
            f"{path}: a recipe is a mapping with the keys {', '.join(item.name for item in fields(Recipe))}"
        )
    return parse_recipe(document, overrides if isinstance(overrides, Mapping) else parse_overrides(overrides))


def parse_recipe(document: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Validate a recipe that is already plain data; `overrides` has dotted keys."""
    if not isinstance(document, Mapping):
        raise InputError(f"a recipe is a mapping, not {document!r:.80}")
    values = copy.deepcopy(dict(document))
    problems = apply_overrides(values, overrides or {})
    passes, found = _parse_passes(values.pop("passes", None))
    recipe, others = parse_fields(Recipe, {key: _empty_section(key, value) for key, value in values.items()}, "")
    problems += others + found
    if problems or recipe is None:
        raise InputError(*problems)
    return replace(recipe, passes=tuple(passes))


def find_recipe(source: str | Path) -> Path:
    """A recipe's file, or the shipped one of that name."""
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"a recipe is a file, a shipped name or a mapping, not {source!r:.80}")
    path = Path(source)
    with suppress(OSError, ValueError):  # no name that a file system takes
        if path.is_file():
            return path
    names = shipped_recipes()
    if str(source) in names:
        return names[str(source)]
    hint = nearest(str(source), names) or f"; shipped are {', '.join(names)}"
    raise InputError(f"there is no recipe file {str(source)!r} and no shipped recipe of that name{hint}")


def shipped_recipes() -> dict[str, Path]:
    """The recipes of this package by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def _empty_section(key: str, value: Any) -> Any:
    """A section whose keys are all commented out reads as null in YAML; it means the defaults."""
    return {} if value is None and key == "calibration" else value


def _parse_passes(entries: Any) -> tuple[list[Pass], list[str]]:
    if entries is None:
        return [], []
    if not isinstance(entries, list):
        return [], ["passes: expected a list of passes"]
    passes: list[Pass] = []
    problems: list[str] = []
    names: list[str] = []
    for place, entry in enumerate(entries):
        where = join("passes", place)
        name, values, problem = _split_entry(entry)
        if problem:
            problems.append(f"{where}: {problem}")
            continue
        step, found = build(name, values, where)
        problems += found
        if step is not None:
            missing = [needed for needed in step.requires if needed not in names]
            problems += [f"{where}.{name}: needs {needed!r} before it; add `- {needed}` above" for needed in missing]
            passes.append(step)
        names.append(name)
    return passes, problems


def _split_entry(entry: Any) -> tuple[str, dict[str, Any], str | None]:
    """`emit` and `gptq: {...}` -> name and fields, or what is wrong with the entry."""
    if isinstance(entry, str):
        return entry, {}, None
    if not isinstance(entry, dict) or not all(isinstance(name, str) for name in entry):
        return "", {}, f"expected a pass, such as `emit` or `gptq: {{damp_fraction: 0.01}}`, got {entry!r}"
    if len(entry) != 1:
        return "", {}, f"expected one pass per entry, got {', '.join(entry) or 'none'}; start each with its own `-`"
    [(name, values)] = entry.items()
    if values is not None and not isinstance(values, dict):
        return "", {}, f"the fields of {name!r} must be a mapping, got {values!r}"
    return name, values or {}, None


def load_passes() -> dict[str, type[Pass]]:
    """Import every file of `aqtx.passes` and return the table."""
    for module in pkgutil.iter_modules(aqtx.passes.__path__):
        importlib.import_module(f"aqtx.passes.{module.name}")
    return registry.PASSES


def build(name: str, fields: dict[str, Any], where: str) -> tuple[Pass | None, list[str]]:
    """The pass of a recipe entry, or the problems that stand against it."""
    passes = load_passes()
    if name not in passes:
        return None, [f"{where}: unknown pass {name!r}{nearest(name, passes)}; `aqtx ls passes` lists them"]
    made, problems = parse_fields(passes[name], fields, f"{where}.{name}")
    if made is not None:
        problems = problems + [f"{where}.{name}: {problem}" for problem in made.validate()]
    return made, problems
