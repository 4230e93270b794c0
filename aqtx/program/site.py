"""Where a weight matrix meets its input: the unit that is planned, rounded and counted."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

import aqtx.formats.grouped_linear  # noqa: F401  (registers the op)
from aqtx.program.annotations import check, known
from aqtx.program.names import expert_key
from aqtx.program.roles import category_of, layer_of
from aqtx.program.weights import WeightStore

LINEAR = torch.ops.aten.linear.default
GROUPED_LINEAR = torch.ops.aqtx.grouped_linear.default  # a stacked projection over rows sorted by expert


@dataclass(frozen=True, eq=False)
class Site:
    """One weight matrix [N, K] that may be quantized, and the node that uses it.

    Annotations are JSON values kept in `node.meta["custom"]["aqtx"]`, a list over experts each; their names, types and
    meanings stand in `aqtx.program.annotations`.
    """

    name: str
    weight: str
    expert: int | None
    shape: tuple[int, int]
    category: str
    layer: int | None
    node: fx.Node
    slots: int  # experts of the stack, 1 for a plain matrix

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def is_to_round(self) -> bool:
        """Whether the plan gives it a packed format."""
        return self.get("format") not in (None, "bf16")

    def get(self, key: str, default: Any = None) -> Any:
        """An annotation of this site; KeyError where none has this name."""
        known(key)
        values = self.node.meta.get("custom", {}).get("aqtx", {}).get(key)
        value = None if values is None else values[self.expert or 0]
        return default if value is None else value

    def set(self, key: str, value: Any) -> None:
        """Annotate this site; KeyError where no annotation has this name, TypeError where its values are others."""
        check(key, value)
        told = self.node.meta.setdefault("custom", {}).setdefault("aqtx", {})
        told.setdefault(key, [None] * self.slots)[self.expert or 0] = value


def weight_node(node: fx.Node) -> fx.Node | None:
    """The parameter that a linear or grouped linear multiplies with, or None for another node."""
    if node.op != "call_function" or node.target not in (LINEAR, GROUPED_LINEAR):
        return None
    weight = node.args[1]
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def sites_of(node: fx.Node, weights: WeightStore, roles: Mapping[str, str] = MappingProxyType({})) -> list[Site]:
    """The sites of one node: one for a linear, one per expert for a grouped linear; `roles` are known by parameter."""
    weight = weight_node(node)
    if weight is None or weight.target not in weights.specs:
        return []
    parameter = str(weight.target)
    shape = weights.specs[parameter].shape
    matrix = (shape[-2], shape[-1])
    if node.target is LINEAR:
        name = parameter.removesuffix(".weight")
        return [Site(name, parameter, None, matrix, roles.get(parameter) or category_of(name), layer_of(name), node, 1)]
    role = roles.get(parameter)
    names = [expert_key(parameter, expert).removesuffix(".weight") for expert in range(shape[0])]
    return [
        Site(name, parameter, expert, matrix, role or category_of(name), layer_of(name), node, shape[0])
        for expert, name in enumerate(names)
    ]
