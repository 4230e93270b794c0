"""Packed linears that share an input as one product: q, k and v, gate and up. Of a bound graph, before it is compiled.

x -> linear(w), x -> linear(v)        becomes        x -> linear(w over v) -> split

Rows of a packed product know nothing of each other, so the same numbers come out. Two inputs are one where the same
ops stand before them: a rotation is shared, or equal.
"""

import operator
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import cast

import torch
from torch import fx

from aqtx.formats import QuantizedTensor
from aqtx.formats.joined import join_rows, layout_of
from aqtx.program.bound_values import forget_unread, put_value, value_of
from aqtx.program.inserted_ops import INSERTED_OPS
from aqtx.program.site import LINEAR


def fuse_linears(module: fx.GraphModule) -> int:
    """Fuse what can be, in place; how many products there are less. Parameters that nothing reads any more go."""
    fewer = 0
    for number, members in enumerate(list(_together(module))):
        _fuse(module, members, f"joined_{number}")
        fewer += len(members) - 1
    forget_unread(module)
    return fewer


def _together(module: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """Lists of two or more linears with one input and one layout, in the graph's order."""
    groups: dict[Hashable, list[fx.Node]] = {}
    read = Counter(str(node.target) for node in module.graph.nodes if node.op == "get_attr" for _ in node.users)
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is not LINEAR or node.kwargs:
            continue
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        if weight.op != "get_attr" or read[str(weight.target)] != 1 or (bias is not None and bias.op != "get_attr"):
            continue
        layout = layout_of(value_of(module, weight))
        if layout is not None:
            groups.setdefault((_origin(node.args[0]), layout, bias is None), []).append(node)
    return (members for members in groups.values() if len(members) > 1)


def _origin(source: fx.Node) -> Hashable:
    """What an input is: the node that it comes from, and what was put on the way."""
    if source.target in INSERTED_OPS:
        rest = (getattr(argument, "target", argument) for argument in source.args[1:])  # buffers by name
        return source.target, *rest, _origin(cast(fx.Node, source.args[0]))
    return source


def _fuse(module: fx.GraphModule, members: list[fx.Node], name: str) -> None:
    graph, first = module.graph, members[0]
    weights = [cast(QuantizedTensor, value_of(module, cast(fx.Node, node.args[1]))) for node in members]
    arguments = [first.args[0], put_value(module, name, join_rows(weights), first)]
    if len(first.args) > 2 and first.args[2] is not None:
        biases = [value_of(module, cast(fx.Node, node.args[2])) for node in members]
        arguments.append(put_value(module, f"{name}_bias", torch.cat(biases), first))
    with graph.inserting_before(first):
        product = graph.call_function(LINEAR, tuple(arguments))
        sizes = [weight.shape[0] for weight in weights]
        split = graph.call_function(torch.ops.aten.split_with_sizes.default, (product, sizes, -1))
        parts = [graph.call_function(operator.getitem, (split, index)) for index in range(len(members))]
    for node, part in zip(members, parts, strict=True):
        part.meta = dict(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)
