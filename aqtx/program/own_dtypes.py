"""Parameters that a checkpoint holds more precisely than the rest keep that precision.

Routers and correction biases are published in float32 inside bf16 checkpoints (DeepSeek-V3, dots1, ERNIE 4.5). Where
the graph casts such a parameter before it computes with it, or computes in the wider dtype anyway, the graph reads it
as it is. Everywhere else, a float32 head for instance, the graph's own dtype is what it computes with, and the
parameter is wide in files and for passes only.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from aqtx.machine.dtypes import is_wider
from aqtx.program.program import Program

_CASTS = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype_layout)
_VIEWS = (
    *(torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.expand.default),
    *(torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.default, torch.ops.aten.squeeze.dim),
    *(torch.ops.aten.slice.Tensor, torch.ops.aten.transpose.int, torch.ops.aten.t.default),
)


def keep_own(program: Program, usual: torch.dtype) -> None:
    """Let parameters keep the dtype that they have in the source, where it is wider than that of most of its weights.

    Args:
        program: just traced, with all parameters in its own dtype.
        usual: the dtype of most of the source's weights.
    """
    nodes = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    weights = program.weights
    for name, spec in weights.specs.items():
        dtype = weights.own_dtype(name)
        if dtype is None or not is_wider(dtype, usual) or not is_wider(dtype, spec.dtype):
            continue
        alone = name in nodes and name not in weights.tied.values()
        reads = alone and reads_as_it_is(nodes[name], dtype)
        weights.specs[name] = replace(spec, dtype=dtype) if reads else replace(spec, stored=dtype)


def reads_as_it_is(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether everything behind a parameter computes the same in kind when it comes in a wider dtype."""
    return all(_takes(user, node, dtype) for user in node.users)


def _takes(user: fx.Node, node: fx.Node, dtype: torch.dtype) -> bool:
    if user.op != "call_function":
        return False
    if user.target in _CASTS:
        return True
    if user.target in _VIEWS:
        return reads_as_it_is(user, dtype)
    pointwise = isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags
    return pointwise and _result(user, node, dtype) == user.meta["val"].dtype


def _result(user: fx.Node, node: fx.Node, dtype: torch.dtype) -> torch.dtype:
    """The dtype of what a pointwise op computes from a wider parameter."""

    def value(argument: fx.Node) -> Any:
        found = argument.meta["val"]
        if not isinstance(found, torch.Tensor):
            return found
        wide = dtype if argument is node else found.dtype
        return torch.empty((1,) * found.dim(), dtype=wide, device="meta")

    arguments = fx.node.map_arg(user.args, value)
    assert callable(user.target)
    made = user.target(*arguments, **{key: found for key, found in user.kwargs.items() if key != "device"})
    assert isinstance(made, torch.Tensor)
    return made.dtype
