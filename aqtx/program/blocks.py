"""A score graph cut into blocks by layer, and a way to run a part of it on given weights.

A block holds the nodes of one layer: it is a function of the values that flow into it (the residual
stream and a few things computed once, such as rotations) and of its own parameters. Nothing
is copied: blocks are lists of the graph's nodes, run one node at a time, and a value is dropped
after its last reader. Weights come from the caller, so one block's are enough.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.errors import InputError
from aqtx.program.roles import layer_of
from aqtx.program.run_ops import runnable
from aqtx.program.site import weight_node

Values = dict[fx.Node, Any]
Visit = Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...] | None]


@dataclass(frozen=True)
class Block:
    """Nodes of one layer (None before the first and after the last), in order, and what crosses its borders."""

    index: int
    layer: int | None
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]  # values of earlier blocks and placeholders that it reads
    parameters: tuple[fx.Node, ...]  # get_attr nodes, buffers included
    later: frozenset[fx.Node]  # values that blocks after it still need, its own or older


def split_blocks(graph: fx.Graph, weights: Collection[str]) -> list[Block]:
    """Blocks in order: what comes before the layers, each layer, what comes after; `weights` are parameters' names."""
    place = _places(graph, weights)
    members: list[list[fx.Node]] = [[] for _ in range(max(place.values(), default=0) + 1)]
    for node in graph.nodes:
        if node.op not in ("get_attr", "placeholder", "output"):
            members[place[node]].append(node)
    blocks: list[Block] = []
    needed = set(graph.output_node().all_input_nodes)
    for index in range(len(members) - 1, -1, -1):
        nodes, own = members[index], set(members[index])
        read = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in own)
        parameters = tuple(source for source in read if source.op == "get_attr")
        inputs = tuple(source for source in read if source.op != "get_attr")
        layers = [layer for source in parameters if (layer := layer_of(str(source.target))) is not None]
        blocks.append(Block(index, max(layers, default=None), tuple(nodes), inputs, parameters, frozenset(needed)))
        needed = (needed - own) | set(inputs)
    return blocks[::-1]


def whole(graph: fx.Graph) -> Block:
    """All of a graph as one block."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    inputs = tuple(node for node in graph.nodes if node.op == "placeholder")
    parameters = tuple(node for node in graph.nodes if node.op == "get_attr")
    return Block(0, None, tuple(nodes), inputs, parameters, frozenset(graph.output_node().all_input_nodes))


def _places(graph: fx.Graph, weights: Collection[str]) -> dict[fx.Node, int]:
    """Block number of each node: 0 before the layers, layer + 1 in one, the last after them."""
    layers = {node: layer_of(str(node.target)) for node in graph.nodes if node.op == "get_attr"}
    last = max((layer for layer in layers.values() if layer is not None), default=-1) + 2
    place: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "output"):
            continue
        sources = [source for source in node.all_input_nodes if source in place]
        latest = max((place[source] for source in sources), default=0)
        own = [source for source in node.all_input_nodes if source in layers]
        in_layer = [layer + 1 for source in own if (layer := layers[source]) is not None]
        if in_layer:
            latest = max(latest, *in_layer)
        elif latest > 0 and any(source.target in weights for source in own):
            latest = last  # a parameter of no layer behind the layers: the final norm, the head
        place[node] = latest
    for node in reversed(list(graph.nodes)):  # constants live where they are used first
        if node in place and node.op == "call_function" and not node.all_input_nodes and node.users:
            place[node] = min((place[user] for user in node.users if user in place), default=place[node])
    return place


def ancestors(targets: Iterable[fx.Node], nodes: Collection[fx.Node]) -> set[fx.Node]:
    """Those of `nodes` that the targets are computed from, the targets' own nodes included."""
    among, found, queue = set(nodes), set[fx.Node](), list(targets)
    while queue:
        node = queue.pop()
        if node in among and node not in found:
            found.add(node)
            queue.extend(node.all_input_nodes)
    return found


def _refuse_overflow(node: fx.Node, value: Tensor) -> None:
    """InputError where a linear's output is beyond what float16 holds: from there on all is inf or NaN."""
    weight = weight_node(node)
    if weight is not None and not bool(value.isfinite().all()):
        raise InputError(
            f"activations of {str(weight.target).removesuffix('.weight')} overflow in float16, whose largest number "
            "is 65,504; compute in bfloat16 (in a recipe `model.dtype: bfloat16`)"
        )


def evaluate(
    nodes: Sequence[fx.Node],
    values: Values,
    keep: Collection[fx.Node],
    *,
    device: torch.device,
    visit: Visit | None = None,
) -> Values:
    """Run `nodes` in order on `values` and return the values of `keep`.

    `visit` sees each node's arguments first, and may return others in their place.
    `values` is used up: what no later node reads is dropped on the way.
    """
    readers: dict[fx.Node, int] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            readers[source] = readers.get(source, 0) + 1
    kept = {node: values[node] for node in keep if node in values}

    def given(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return values[argument]
        return device if isinstance(argument, torch.device) else argument  # the graph was traced on meta

    for node in nodes:
        arguments = fx.node.map_aggregate(node.args, given)
        keywords = fx.node.map_aggregate(node.kwargs, given)
        if visit is not None:
            replaced = visit(node, arguments)
            arguments = arguments if replaced is None else replaced
        value = runnable(node.target)(*arguments, **keywords)
        del arguments, keywords
        if getattr(value, "dtype", None) is torch.float16:
            _refuse_overflow(node, value)
        if readers.get(node):
            values[node] = value
        if node in keep:
            kept[node] = value
        del value
        for source in node.all_input_nodes:
            readers[source] -= 1
            if not readers[source]:
                values.pop(source, None)
    return kept
