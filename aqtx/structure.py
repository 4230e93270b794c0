"""Structural edits: changes of a graph's nodes that are recorded as JSON and replayed.

The same edits are replayed on every entry (scoring, generation) and when a checkpoint is loaded,
so they name weights, never nodes. Changes of weight values are not edits.
"""

from collections.abc import Callable
from typing import Any

from torch import fx

from aqtx.program import weight_node

Edit = dict[str, Any]


def nodes_reading(graph: fx.Graph, weight: str) -> list[fx.Node]:
    """The linear and grouped linear nodes that multiply with a parameter."""
    return [node for node in graph.nodes if (found := weight_node(node)) is not None and found.target == weight]


def insert_on_input(node: fx.Node, op: Any, arguments: tuple[Any, ...]) -> fx.Node:
    """Put `op(input, *arguments)` before a linear's input, sharing an equal node that stands there already.

        x -> linear        becomes        x -> op -> linear
    """
    source = node.args[0]
    assert isinstance(source, fx.Node)
    twin = next((user for user in source.users if user.target is op and user.args[1:] == arguments), None)
    if twin is None:
        with node.graph.inserting_after(source if not arguments_of(arguments) else max_node(source, arguments)):
            twin = node.graph.call_function(op, (source, *arguments))
        twin.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        twin.meta["val"] = source.meta.get("val")
    node.replace_input_with(source, twin)
    return twin


def arguments_of(arguments: tuple[Any, ...]) -> list[fx.Node]:
    """The nodes among an op's further arguments."""
    return [argument for argument in arguments if isinstance(argument, fx.Node)]


def max_node(source: fx.Node, arguments: tuple[Any, ...]) -> fx.Node:
    """The latest of the nodes that an inserted op depends on."""
    return max([source, *arguments_of(arguments)])


def quantize_activation(graph: fx.Graph, edit: Edit) -> None:
    """Quantize the input of a weight's nodes per token; `formats` has one name per expert, or one."""
    import torch

    import aqtx.formats.activation  # noqa: F401  (registers the ops)

    for node in nodes_reading(graph, edit["weight"]):
        formats = edit["formats"]
        if len(set(formats)) == 1:
            insert_on_input(node, torch.ops.aqtx.quantize_activation.default, (formats[0],))
        else:
            op = torch.ops.aqtx.quantize_activation_grouped.default
            insert_on_input(node, op, (node.args[2], ",".join(formats)))


EDITS: dict[str, Callable[[fx.Graph, Edit], None]] = {"quantize_activation": quantize_activation}


def replay(graph_module: fx.GraphModule, edits: list[Edit]) -> None:
    """Make the edits, in order, on one entry's graph."""
    for edit in edits:
        EDITS[edit["edit"]](graph_module.graph, edit)
    if edits:
        graph_module.graph.lint()
        graph_module.recompile()
