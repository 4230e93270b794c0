"""The experts of a layer as one op of the compiled kernel. Of a bound graph, before it is compiled.

sort by expert, gather, gate and up, silu, down, put back, weigh, sum        becomes        experts

Found by what the nodes compute, from the product with `down` in both directions: experts whose products have biases,
other activations than silu or ops between the matrices, such as a rotation before `down`, stay as they are.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aqtx.formats.chosen_experts import described
from aqtx.program.bound_values import forget_unread, put_value, value_of
from aqtx.program.hadamard_op import OP as HADAMARD
from aqtx.program.site import GROUPED_LINEAR

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten.flatten.using_ints)


@dataclass(frozen=True)
class Layer:
    """Nodes of one layer's experts: what they read, their stacks, and the sum that they end in."""

    x: fx.Node  # [T, H]
    weights: fx.Node  # [T, k]
    chosen: fx.Node  # [T, k]
    stacks: tuple[fx.Node, fx.Node, fx.Node]  # gate, up, down
    rotation: tuple[Any, ...] | None  # arguments behind x of a rotation before gate and up
    out: fx.Node  # [T, H], in the dtype of x


def fuse_experts(module: fx.GraphModule) -> int:
    """Fuse every layer's experts that can be, in place; how many layers they are."""
    graph = module.graph
    layers = [layer for node in graph.nodes if (layer := _layer(node)) is not None]
    fused = 0
    for number, layer in enumerate(layers):
        made = described(*(value_of(module, stack) for stack in layer.stacks))
        if made is None:
            continue
        parts = [put_value(module, f"experts_{number}_{i}", part, layer.out) for i, part in enumerate(made.parts)]
        with graph.inserting_before(layer.out):
            x = layer.x
            if layer.rotation is not None:
                x = graph.call_function(HADAMARD, (x, *layer.rotation))
            arguments = (x, layer.weights, layer.chosen, parts, made.specs, made.slots, made.buckets, made.inner)
            node = graph.call_function(torch.ops.aqtx_cpu.experts.default, arguments)
        node.meta = dict(layer.out.meta)
        layer.out.replace_all_uses_with(node)
        fused += 1
    forget_unread(module)
    return fused


def _layer(down: Any) -> Layer | None:
    """The layer whose last product is this node, if it computes what the op computes and nothing else."""
    if down.target is not GROUPED_LINEAR:
        return None
    inner, offsets = down.args[0], down.args[2]
    gate, up = _gated(inner)
    if gate is None or up is None or gate.args[0] is not up.args[0]:
        return None
    sort = _down(offsets, (_aten.to.dtype, _aten._to_copy.default), _aten.searchsorted.Tensor, operator.getitem)
    chosen = _down(sort, _aten.sort.stable, _VIEWS)
    rows: Any = gate.args[0]
    rotation = None
    if _is(rows, HADAMARD):
        rows, rotation = rows.args[0], rows.args[1:]
    out = _up(down, _aten.index.Tensor, _VIEWS, _aten.mul.Tensor, _aten.sum.dim_IntList)
    if sort is None or chosen is None or out is None or not _is(rows, _aten.index.Tensor):
        return None
    [place] = rows.args[1]
    product = out.args[0]
    back, weights = product.args
    [order_of_back] = back.args[0].args[1]
    order: Any = place.args[0] if _is(place, _aten.floor_divide.default) else None
    stacks = (gate.args[1], up.args[1], down.args[1])
    found = (
        _is(order, operator.getitem) and order.args == (sort, 1),
        _is(order_of_back, _aten.argsort.default) and order_of_back.args == (order,),
        _is(weights, _aten.unsqueeze.default) and weights.args[1] == -1,
        gate.args[2] is offsets and up.args[2] is offsets,
        out.args[1:] == ([1],) and not out.kwargs,
        back.args[1][1:2] == [place.args[1]],
        all(stack.op == "get_attr" for stack in stacks),
    )
    rounded = _rounded(out, rows.args[0])
    if rounded is None or not all(found):
        return None
    return Layer(rows.args[0], weights.args[0], chosen, stacks, rotation, rounded)


def _gated(inner: Any) -> tuple[Any, Any]:
    """The products with gate and up of silu(gate) * up."""
    if not _is(inner, _aten.mul.Tensor):
        return None, None
    for one, other in (inner.args, inner.args[::-1]):
        if _is(one, _aten.silu.default) and _is(one.args[0], GROUPED_LINEAR) and _is(other, GROUPED_LINEAR):
            return one.args[0], other
    return None, None


def _rounded(out: fx.Node, x: fx.Node) -> fx.Node | None:
    """The sum in the dtype of x, which it has at once or is cast to; None where it is used in another."""
    wanted, found = (node.meta["val"].dtype if "val" in node.meta else None for node in (x, out))
    if found is wanted:
        return out
    casts = [user for user in out.users if user.target is _aten.to.dtype and user.args[1] is wanted]
    return casts[0] if len(casts) == len(out.users) == 1 else None


def _is(node: Any, targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (targets if isinstance(targets, tuple) else (targets,))


def _down(node: Any, *targets: Any) -> Any:
    """What a chain of ops was made from, each the first input of the one before; None where it is another chain."""
    for target in targets:
        if not _is(node, target):
            return None
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _up(node: Any, *targets: Any) -> Any:
    """The end of a chain of ops that begins with a node, each the only reader of the one before."""
    for target in targets:
        if len(node.users) != 1 or not _is(next(iter(node.users)), target):
            return None
        node = next(iter(node.users))
    return node
