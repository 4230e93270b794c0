"""The ops that stand between a linear's input and the linear: put there, found again, replaced."""

from typing import Any

import torch
from torch import Tensor, fx, nn

import aqtx.formats.activation  # noqa: F401  (registers the ops)
from aqtx.program.hadamard_op import OP as HADAMARD

ACTIVATION_OPS = (torch.ops.aqtx.quantize_activation.default, torch.ops.aqtx.quantize_activation_grouped.default)
INSERTED_OPS: set[Any] = {HADAMARD, *ACTIVATION_OPS}  # what is found again before a linear; kinds of edits add theirs

Step = tuple[Any, tuple[Any, ...]]  # an op and its arguments after the input


def insert_on_input(node: fx.Node, op: Any, arguments: tuple[Any, ...]) -> fx.Node:
    """Put `op(input, *arguments)` before a linear's input, sharing an equal node that stands there already.

    x -> linear        becomes        x -> op -> linear
    """
    source = node.args[0]
    assert isinstance(source, fx.Node)
    twin = next((user for user in source.users if user.target is op and user.args[1:] == arguments), None)
    if twin is None:
        needed = [argument for argument in arguments if isinstance(argument, fx.Node)]
        with node.graph.inserting_after(max([source, *needed])):
            twin = node.graph.call_function(op, (source, *arguments))
        twin.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        twin.meta["val"] = source.meta.get("val")
    node.replace_input_with(source, twin)
    return twin


def inserted_ops(node: fx.Node) -> list[fx.Node]:
    """The nodes that edits put before a linear, first to last: its rotation, then its quantization."""
    chain: list[fx.Node] = []
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target in INSERTED_OPS:
        chain.insert(0, source)
        source = source.args[0]
    return chain


def replace_inserted(node: fx.Node, steps: list[Step]) -> None:
    """Put other ops before a linear than stand there; nodes that nothing reads any more go."""
    chain = inserted_ops(node)
    if chain:
        node.replace_input_with(chain[-1], chain[0].args[0])  # type: ignore[arg-type]
    for op, arguments in steps:
        insert_on_input(node, op, arguments)
    for old in reversed(chain):
        if not old.users:
            node.graph.erase_node(old)


def get_attr(graph_module: fx.GraphModule, name: str, like: Tensor) -> fx.Node:
    """The node of a parameter or buffer, made before all others if the graph has none."""
    graph = graph_module.graph
    found = next((node for node in graph.nodes if node.op == "get_attr" and node.target == name), None)
    if found is None:
        *path, leaf = name.split(".")
        owner: nn.Module = graph_module
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        blank = torch.empty_like(like, device="meta")
        owner.register_buffer(leaf, blank, persistent=False)
        with graph.inserting_before(next(iter(graph.nodes))):
            found = graph.get_attr(name)
        found.meta["val"] = blank
    return found
