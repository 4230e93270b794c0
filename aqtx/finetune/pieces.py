"""A graph cut into pieces, each a block as a module whose weights are given when it runs; or all of it as one piece."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from aqtx.program.blocks import Block, Values
from aqtx.program.program import Program, bind

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """A block as a function: values that flow in and weights by name -> values that flow out."""

    block: Block
    module: fx.GraphModule
    outputs: tuple[fx.Node, ...]
    names: tuple[str, ...]  # parameters and buffers that it reads

    def __call__(self, values: Mapping[fx.Node, Tensor], weights: Weights) -> Values:
        """Its outputs; `weights` holds all that the piece reads and was not bound to."""
        given = tuple(values[node] for node in self.block.inputs)
        return dict(zip(self.outputs, self.run(weights, *given), strict=True))

    def run(self, weights: Weights, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The same of inputs and outputs in their order."""
        found: tuple[Tensor, ...] = torch.func.functional_call(self.module, dict(weights), inputs)
        return found


def piece_of(block: Block, program: Program, wanted: Collection[fx.Node], held: Weights) -> Piece:
    """A block's piece that also hands out the `wanted` nodes; bound to the values `held`, to empty ones elsewhere."""
    outputs = tuple(node for node in block.nodes if node in block.later or node in wanted)
    names = tuple(dict.fromkeys(str(node.target) for node in block.parameters))
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in block.inputs}
    made |= {node: graph.create_node("get_attr", str(node.target)) for node in block.parameters}
    for node in block.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in outputs))
    values = {name: held.get(name, torch.empty(0, dtype=program.dtype)) for name in names}
    parameters = {name: value for name, value in values.items() if name in program.weights.specs}
    buffers = {name: value for name, value in values.items() if name in program.buffers}
    return Piece(block, bind(graph, parameters, buffers, program.device), outputs, names)


def computed(program: Program, trained: Weights) -> dict[str, Tensor]:
    """What trains, float32, as the graph computes with it."""
    return {name: value.to(program.weights.specs[name].dtype) for name, value in trained.items()}
