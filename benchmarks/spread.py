"""Deal the channels before down_proj out over its blocks, large and small ones alike, without changing the function.

A block Hadamard spreads an outlier over its own block only: two outliers in one block cost twice. Channels are
ordered by their mean magnitude on calibration text and dealt to the blocks forth and back, for each expert by itself.
The order is exact and free: rows of gate and up and columns of down are exchanged alike.
"""

from typing import Any

import torch
from torch import Tensor, fx

from aqtx.program.program import Program
from aqtx.program.site import LINEAR, Site, weight_node
from aqtx.registry import Context
from aqtx.rotation.row_ops import is_linear
from aqtx.sensitivity.rounded_run import calibrated, results


class Magnitude:
    """Computes as before and sums |x| by expert and channel [E, K]; an expert that no token has met has zeros."""

    def __init__(self, site: Site) -> None:
        self.sums = torch.zeros(site.slots, site.shape[1], dtype=torch.float64)

    def arguments(self, node: fx.Node, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as they are."""
        x = given[0].flatten(0, -2)
        ends = [len(x)] if node.target is LINEAR else given[2].tolist()
        for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            self.sums[expert] += x[start:end].abs().sum(0, dtype=torch.float64)
        return given


def spread(program: Program, context: Context, block: int) -> None:
    """Exchange the channels between gate and up, and down, of every layer."""
    seen = {
        site.node: Magnitude(site) for site in program.sites() if site.category.endswith("down") and not site.expert
    }
    with calibrated(program, context) as (runner, blocks, _):
        for part in blocks[:-1]:
            for batch, values in enumerate(results(runner, part, runner.load(part), seen)):
                runner.stream.write(batch, values)
    for down, kept in seen.items():
        order = torch.stack([dealt(row, block) for row in kept.sums])
        for writer in writers(down):
            _exchange(program, writer, order, -2)
        _exchange(program, down, order, -1)


def dealt(magnitude: Tensor, block: int) -> Tensor:
    """The order [K] in which blocks of neighbours get channels of every size, as a player deals forth and back."""
    num_blocks = len(magnitude) // block
    rounds = magnitude.argsort(descending=True, stable=True).reshape(block, num_blocks).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)


def writers(down: fx.Node) -> list[fx.Node]:
    """The linears whose product, through an activation function, is down's input."""
    found, queue = [], [down.args[0]]
    while queue:
        node = queue.pop()
        assert isinstance(node, fx.Node)
        if is_linear(node):
            found.append(node)
        else:
            queue += [source for source in node.all_input_nodes if source.meta["val"].shape == node.meta["val"].shape]
    return found


def _exchange(program: Program, node: fx.Node, order: Tensor, dim: int) -> None:
    """Reorder rows (dim -2) or columns (-1) of a node's weight, each expert's by its own order [E, K]."""
    weight = weight_node(node)
    assert weight is not None and len(node.args) == (2 if order.shape[0] == 1 else 3), "biases are not exchanged"
    name = str(weight.target)
    value = program.weights.precise(name)
    stack = value if value.dim() == 3 else value.unsqueeze(0)
    places = order.unsqueeze(1 if dim == -1 else 2).expand(stack.shape)
    program.weights.put(name, stack.gather(dim, places).view(value.shape))
