"""Structural edits: changes of a graph's nodes that are recorded as JSON and replayed.

The same edits are replayed on every entry (scoring, generation) and when a checkpoint is loaded,
so they name weights, never nodes. Changes of weight values are not edits.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from aqtx.program.program import Program, weight_node

if TYPE_CHECKING:
    from torch import Tensor

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


def activation_ops() -> tuple[Any, ...]:
    """The ops that quantize an input per token."""
    import aqtx.formats.activation  # noqa: F401  (registers the ops)

    return torch.ops.aqtx.quantize_activation.default, torch.ops.aqtx.quantize_activation_grouped.default


def inserted_ops(node: fx.Node) -> list[fx.Node]:
    """The nodes that edits put before a linear, first to last: its rotation, then its quantization."""
    from aqtx.program.hadamard_op import OP

    chain: list[fx.Node] = []
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target in (OP, *activation_ops()):
        chain.insert(0, source)
        source = source.args[0]
    return chain


def replace_inserted(node: fx.Node, steps: list[tuple[Any, tuple[Any, ...]]]) -> None:
    """Put other ops before a linear than stand there; nodes that nothing reads any more go."""
    chain = inserted_ops(node)
    if chain:
        node.replace_input_with(chain[-1], chain[0].args[0])  # type: ignore[arg-type]
    for op, arguments in steps:
        insert_on_input(node, op, arguments)
    for old in reversed(chain):
        if not old.users:
            node.graph.erase_node(old)


def _steps(node: fx.Node) -> list[tuple[Any, tuple[Any, ...]]]:
    return [(old.target, old.args[1:]) for old in inserted_ops(node)]


def quantize_activation(graph_module: fx.GraphModule, edit: Edit) -> None:
    """Quantize the input of a weight's nodes per token; `formats` has one name per expert, or one."""
    alike, grouped = activation_ops()
    formats = edit["formats"]
    for node in nodes_reading(graph_module.graph, edit["weight"]):
        if len(set(formats)) == 1:
            insert_on_input(node, alike, (formats[0],))
        else:
            insert_on_input(node, grouped, (node.args[2], ",".join(formats)))


def hadamard(graph_module: fx.GraphModule, edit: Edit) -> None:
    """Rotate the input of a weight's nodes, block by block; nodes with one input share the rotation.

    x -> quantize -> linear        becomes        x -> rotate -> quantize -> linear
    """
    from aqtx.program.hadamard_op import OP, buffers

    blank = buffers(edit["block"], edit["seed"], torch.float32)
    matrices = tuple(get_attr(graph_module, name, value) for name, value in blank.items())
    for node in nodes_reading(graph_module.graph, edit["weight"]):
        replace_inserted(node, [(OP, matrices), *_steps(node)])


def remove_hadamard(graph_module: fx.GraphModule, edit: Edit) -> None:
    """Take the rotation off the input of a weight's nodes: it lies in the weights before them now."""
    from aqtx.program.hadamard_op import OP

    for node in nodes_reading(graph_module.graph, edit["weight"]):
        replace_inserted(node, [step for step in _steps(node) if step[0] is not OP])
    for node in [node for node in graph_module.graph.nodes if node.op == "get_attr" and not node.users]:
        graph_module.graph.erase_node(node)


def get_attr(graph_module: fx.GraphModule, name: str, like: "Tensor") -> fx.Node:
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


EDITS: dict[str, Callable[[fx.GraphModule, Edit], None]] = {
    "quantize_activation": quantize_activation,
    "hadamard": hadamard,
    "remove_hadamard": remove_hadamard,
}


def prepare(program: Program, edit: Edit) -> None:
    """Give the program the buffers that an edit's nodes will read."""
    if edit["edit"] == "hadamard":
        from aqtx.program.hadamard_op import buffers

        program.buffers.update(buffers(edit["block"], edit["seed"], program.dtype))


def replay(graph_module: fx.GraphModule, edits: list[Edit]) -> None:
    """Make the edits, in order, on one entry's graph."""
    for edit in edits:
        EDITS[edit["edit"]](graph_module, edit)
    if edits:
        graph_module.graph.lint()
        graph_module.recompile()
