"""The rows that linears of a block multiply with, the gradients of what they put out, and whose sequence each row is.

Legend: R rows of a node in one batch (sorted by expert where it is grouped), K inputs, N outputs, E experts.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.errors import InputError
from aqtx.program.blocks import Block, Values
from aqtx.program.gate_scores import find_gate_scores
from aqtx.program.site import LINEAR


@dataclass(frozen=True)
class Rows:
    """What one linear saw of one batch."""

    x: Tensor  # [R, K]
    d: Tensor  # [R, N], the loss's gradient for its outputs
    sequence: Tensor  # [R], the row's sequence among the batch's
    offsets: Tensor | None  # [E] end rows, None for a plain linear

    def of(self, expert: int | None) -> "Rows":
        """The rows of one expert."""
        if expert is None or self.offsets is None:
            return self
        ends = [0, *self.offsets.tolist()]
        rows = slice(ends[expert], ends[expert + 1])
        return Rows(self.x[rows], self.d[rows], self.sequence[rows], None)


def mixes_nothing(nodes: Collection[fx.Node], blocks: Collection[Block]) -> bool:
    """Whether every row of these linears can be told its sequence, so that a batch may hold several."""
    for block in blocks:
        for node in block.nodes:
            if node in nodes and node.target is not LINEAR and order_of(node, block) is None:
                return False
    return True


def order_of(node: fx.Node, block: Block) -> fx.Node | None:
    """Where a grouped linear's rows lie in the order of tokens: row i of the tokens was sorted to order[i]."""
    offsets = node.args[2]
    assert isinstance(offsets, fx.Node)
    try:
        return find_gate_scores(offsets, block.nodes, 1).order
    except InputError:
        return None


class Taps:
    """Takes the rows of a block's linears out of one batch."""

    def __init__(self, block: Block, wanted: Collection[fx.Node]) -> None:
        self.nodes = [node for node in block.nodes if node in wanted]
        self.x: dict[fx.Node, Tensor] = {}
        self.orders = {node: order_of(node, block) for node in self.nodes if node.target is not LINEAR}
        offsets = [node.args[2] for node in self.orders]
        self.keep = {*self.nodes, *(node for node in (*self.orders.values(), *offsets) if isinstance(node, fx.Node))}

    def visit(self, node: fx.Node, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keep x; where nothing before it carries a gradient, let one begin here."""
        if node not in self.keep or node not in self.nodes:
            return None
        x, *rest = arguments
        self.x[node] = x.detach()
        return None if x.requires_grad else (x.detach().requires_grad_(), *rest)

    def outputs(self, found: Values) -> dict[fx.Node, Tensor]:
        """The linears' outputs."""
        return {node: found[node] for node in self.nodes}

    def told(self, found: Values, gradients: tuple[Tensor | None, ...], num_sequences: int) -> dict[str, Tensor]:
        """Rows of all nodes under the names that `Backward.rows_of` reads; x once for all that share it."""
        tensors: dict[str, Tensor] = {}
        for node, d in zip(self.nodes, gradients, strict=True):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            x, y = self.x[node].flatten(0, -2), found[node]
            tensors[f"x.{source.name}"] = x
            tensors[f"d.{node.name}"] = (torch.zeros_like(y) if d is None else d).flatten(0, -2)
            sequence = torch.arange(len(x), device=x.device) // max(len(x) // num_sequences, 1)
            if node in self.orders:
                tensors[f"offsets.{node.name}"] = found[node.args[2]].clone()  # type: ignore[index]
                order = self.orders[node]
                if order is not None:
                    sequence = torch.empty_like(sequence).scatter_(0, found[order].flatten(), sequence)
            tensors[f"sequence.{node.name}"] = sequence.to(torch.int32)
        return tensors
