"""What config.json says of a compressed-tensors folder: groups of modules and the scheme of each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aqtx.errors import InputError
from aqtx.program.names import Shape

_LAYOUTS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"),
)
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_FLOATS = {4: "e2m1", 6: "e2m3", 8: "e4m3"}


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group are stored."""

    bits: int
    is_float: bool
    strategy: str
    group: int | None
    block: tuple[int, int] | None

    @property
    def middle(self) -> int:
        """What packed integers are offset by."""
        return 1 << (self.bits - 1)

    @property
    def element(self) -> str:
        """Its code in words: "int4", "fp8 e4m3"."""
        return f"fp{self.bits} {_FLOATS[self.bits]}" if self.is_float else f"int{self.bits}"

    def blocks(self, shape: Shape) -> tuple[int, int] | None:
        """Rows and columns under a scale of a matrix [N, K], where the scheme tells."""
        if self.block is not None:
            return self.block
        return None if self.group is None else (1, self.group)


@dataclass(frozen=True)
class Schemes:
    """Groups of a folder: their targets and schemes."""

    where: str
    groups: tuple[tuple[tuple[str, ...], Scheme], ...]

    @classmethod
    def read(cls, section: Mapping[str, Any], folder: Path) -> "Schemes":
        """From `quantization_config`.

        Raises:
            InputError: it is malformed, or the weights are packed in a way that is not understood; by name.
        """
        where = f"{folder / 'config.json'}: quantization_config"
        _refuse_layouts(section, where)
        groups = section.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise InputError(f"{where}: config_groups must map names to objects")
        made = []
        for name, group in groups.items():
            targets, weights = group.get("targets"), group.get("weights")
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                raise InputError(f"{where}: config_groups.{name}.targets must be a list of names")
            if weights is not None:
                made.append((tuple(targets), _scheme(weights, f"{where}: config_groups.{name}.weights")))
        return cls(where, tuple(made))

    def of(self, module: str) -> Scheme:
        """The scheme of a module: by its name or a pattern, else by the kind of module ("Linear")."""
        kinds = []
        for targets, scheme in self.groups:
            for target in targets:
                if target == module or _matches(target, module, self.where):
                    return scheme
                if not target.startswith("re:") and "." not in target:
                    kinds.append(scheme)
        if len(set(kinds)) == 1:
            return kinds[0]
        raise InputError(f"{self.where}: {'no' if not kinds else 'more than one'} group matches {module}")


def _matches(target: str, module: str, where: str) -> bool:
    try:
        return target.startswith("re:") and re.match(target[3:], module) is not None
    except re.error as error:
        raise InputError(f"{where}: the target {target!r:.80} is no regular expression: {error}") from None


def _refuse_layouts(section: Mapping[str, Any], where: str) -> None:
    """InputError for what changes weights beyond codes and scales."""
    layouts = [section.get("format"), *(group.get("format") for group in _objects(section.get("config_groups")))]
    for layout in layouts:
        if layout is not None and layout not in _LAYOUTS:
            told = f"{where}: compressed-tensors' format {layout!r:.80} is not read"
            raise InputError(f"{told}; give the model that it was made from")
    sparsity = section.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise InputError(f"{where}: sparse weights of compressed-tensors are not read")
    if section.get("transform_config"):
        raise InputError(f"{where}: compressed-tensors' transform_config (rotations as the model runs) is not read")


def _objects(groups: Any) -> list[dict[str, Any]]:
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _scheme(weights: Any, where: str) -> Scheme:
    if not isinstance(weights, dict):
        raise InputError(f"{where} must be an object, not {weights!r:.80}")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    group, block = weights.get("group_size"), weights.get("block_structure")
    strategy = strategy or ("channel" if group in (None, -1) else "group")
    fits = {"int": range(1, 9), "float": _FLOATS}
    if type(bits) is not int or not isinstance(kind, str) or bits not in fits.get(kind, ()):
        raise InputError(f"{where}: {kind!r:.80} of {bits!r:.80} bits is not read")
    if strategy not in _STRATEGIES:
        known = ", ".join(_STRATEGIES)
        raise InputError(f"{where}: the strategy {strategy!r:.80} is not read, only {known}")
    grouped = strategy in ("group", "tensor_group")
    if grouped and not _is_size(group):
        raise InputError(f"{where}: group_size must be a positive whole number, not {group!r:.80}")
    if strategy == "block" and not (isinstance(block, list) and len(block) == 2 and all(map(_is_size, block))):
        raise InputError(f"{where}: block_structure must be two positive whole numbers, not {block!r:.80}")
    pair = (block[0], block[1]) if strategy == "block" and block else None
    return Scheme(bits, kind == "float", strategy, group if grouped else None, pair)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
