"""The weights of a checkpoint folder under the names that graphs give them, whatever layout the files have.

transformers knows every layout in which a family was ever published: experts one by one or fused, gate and up in one
tensor, turned, under other names. Its conversions are followed with pieces (`conversions.py`), then the model's fused
experts are cut into gate, up and down as its graph has them. Nothing is read on the way.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aqtx.checkpoint.huggingface import experts
from aqtx.checkpoint.huggingface.conversions import Target, convert
from aqtx.checkpoint.huggingface.skeleton import blank
from aqtx.checkpoint.pieces import Piece, stored
from aqtx.checkpoint.reader import LISTED, CheckpointReader, ignorable
from aqtx.errors import InputError
from aqtx.machine.dtypes import widest
from aqtx.models.on_disk import left_out, renamed
from aqtx.program.names import Shape


@dataclass(frozen=True)
class PieceSource:
    """Weights by parameter name, each put together from stored tensors when it is asked for.

    Contiguous, and stacks copied, as those are that lie in a checkpoint of ours expert by expert: products of strided
    or unaligned matrices are rounded in another order.
    """

    pieces: Mapping[str, Piece]
    dtype_of: Callable[[str], torch.dtype | None]  # of a stored tensor by key

    def parameter(self, name: str) -> Tensor:
        """The whole parameter."""
        value = self.pieces[name].read()
        return value.contiguous() if value.dim() < 3 else value.clone(memory_format=torch.contiguous_format)

    def own_dtype(self, name: str) -> torch.dtype | None:
        """The widest of the tensors that it is put together from, None where one is packed."""
        return widest(self.dtype_of(key) for key in self.pieces[name].leaves())

    def stored(self, name: str) -> Tensor | None:
        """A parameter, None where the file does not have it."""
        return self.pieces[name].read() if name in self.pieces else None

    def expert(self, name: str, index: int) -> Tensor:
        """One expert's matrix; the others are not read."""
        return self.pieces[name].select(0, index).read().contiguous()

    def check(self, shapes: Mapping[str, Shape], folder: Path) -> None:
        """InputError where a parameter has no pieces, or pieces of another shape."""
        missing = [name for name in shapes if name not in self.pieces]
        wrong = [name for name in shapes if name in self.pieces and self.pieces[name].shape != shapes[name]]
        problems = [f"{folder}: tensor {name} is missing" for name in missing]
        problems += [
            f"{folder}: {name} has shape {list(self.pieces[name].shape)}, config.json asks for {list(shapes[name])}"
            for name in wrong
        ]
        if problems:
            raise InputError(*problems[:LISTED])


@dataclass
class Layout:
    """What a folder holds for a model: parameters in pieces, and the keys of tensors that it does without."""

    pieces: dict[str, Piece] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def layout_of(reader: CheckpointReader, config: Mapping[str, Any]) -> Layout:
    """The pieces of every parameter of transformers' model of a config, by canonical name (experts split).

    Raises:
        InputError: tensors are missing, do not fit, or belong to nothing; or the layout cannot be followed.
    """
    model = blank(config)
    found, unknown = _parameters(reader, model)
    spare, extra = _sorted_out(unknown, model, config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = shapes.keys() - dict(model.named_parameters()).keys() - dict(model.named_buffers()).keys()
    folder = reader.folder
    problems = [f"{folder}: tensor {name} is missing" for name in sorted(shapes.keys() - found.keys() - tied)]
    problems += [f"{folder}: tensor {key} belongs to no parameter of the model" for key in sorted(extra)]
    problems += [
        f"{folder}: {name} has shape {list(found[name].shape)}, config.json asks for {list(shapes[name])}"
        for name in sorted(shapes.keys() & found.keys())
        if found[name].shape != shapes[name]
    ]
    floats = [name for name, value in model.state_dict().items() if value.is_floating_point()]
    problems += reader.no_floats(sorted(leaf for name in floats if name in found for leaf in found[name].leaves()))
    if problems:
        more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        raise InputError(*problems[:LISTED], *more)
    return Layout(_canonical(found, model), spare)


def _parameters(reader: CheckpointReader, model: nn.Module) -> tuple[dict[str, Piece], list[str]]:
    """Pieces by the names of transformers' model, and keys that are none of its parameters."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found, unknown = _Keys(model, shapes, renamings, converters).gathered(reader.entries)
    pieces: dict[str, Piece] = {}
    for name, keys in found.items():
        parts = {
            pattern: [stored(reader.part, key, reader.shape(key)) for key in _complete(reader, group)]
            for pattern, group in keys.items()
        }
        [first, *others] = parts
        if first is None:
            if others or len(parts[first]) > 1:
                names = " and ".join(key for group in keys.values() for key in group)
                raise InputError(f"{reader.folder}: {names} are both {name}")
            pieces[name] = parts[first][0]
            continue
        rule = by_pattern[first]
        made = convert(Target(rule, name, shapes, model.config), parts)
        pieces.update(made)
    return pieces, unknown


@dataclass(frozen=True)
class _Keys:
    """Where transformers puts the tensors of a file."""

    model: Any
    shapes: Mapping[str, Shape]
    renamings: list[Any]
    converters: list[Any]

    def gathered(self, keys: Iterable[str]) -> tuple[dict[str, dict[Any, list[str]]], list[str]]:
        """Parameter -> pattern of its rule, None where there is none -> keys in order; and keys without parameter."""
        from transformers.core_model_loading import dot_natural_key

        found: dict[str, dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
        unknown = []
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = self._renamed(key)
            if name in self.shapes:
                found[name][pattern].append(key)
            else:
                unknown.append(key)
        return found, unknown

    def _renamed(self, key: str) -> tuple[str, str | None]:
        """The parameter that a key belongs to; one that has the model's own name already stays."""
        from transformers.core_model_loading import rename_source_key

        key, prefix = renamed({"model_type": self.model.config.model_type}, key), self.model.base_model_prefix
        made = rename_source_key(key, self.renamings, self.converters, prefix, self.shapes)  # type: ignore[arg-type]
        if made[0] not in self.shapes and key in self.shapes:
            return key, None
        return made


def _complete(reader: CheckpointReader, keys: list[str]) -> list[str]:
    """Keys that differ in one number only must count from 0 without a gap."""
    if len(keys) == 1:
        return keys
    split = [re.split(r"(\d+)", key) for key in keys]
    varying = [at for at in range(1, len(split[0]), 2) if len({parts[at] for parts in split}) > 1]
    if len(varying) == 1:
        for at, parts in enumerate(split):
            if int(parts[varying[0]]) != at:
                parts[varying[0]] = str(at)
                raise InputError(f"{reader.folder}: tensor {''.join(parts)} is missing")
    return keys


def _sorted_out(keys: list[str], model: nn.Module, config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(those that transformers' class or ours does without, those that nobody knows)."""
    patterns = [re.compile(text) for text in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    spare = [key for key in keys if left_out(config, key) or any(pattern.search(key) for pattern in patterns)]
    return spare, [key for key in keys if key not in set(spare) and not ignorable(key)]


def _canonical(found: dict[str, Piece], model: nn.Module) -> dict[str, Piece]:
    """Fused experts as gate, up and down, as `skeleton` splits their parameters."""
    made = dict(found)
    for name, module in model.named_modules():
        if experts.is_fused_experts(module):
            fused = {part: made.pop(f"{name}.{part}") for part in experts.fused_names(module)}
            made |= {f"{name}.{part}": piece for part, piece in experts.cut(module, fused).items()}
    return made
