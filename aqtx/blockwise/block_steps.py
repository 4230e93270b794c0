"""An entry of a program that need not fit into memory, on several batches at once: each call walks over its blocks.

A block's weights are read, every batch goes through it, and the weights are let go; those of the first blocks stay, as
many as fit. A cache is written in place, wherever it lies.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.blockwise.work_size import block_bytes
from aqtx.machine.memory import release_unused
from aqtx.program.blocks import Block, Values, evaluate, split_blocks
from aqtx.program.program import Program


@dataclass
class BlockSteps:
    """Logits of an entry, `score` or `step`, with a part of its weights in memory.

    Args:
        program: not changed while this lives.
        entry: its name.
        room: bytes that weights may take, those of the block at work included.
    """

    program: Program
    entry: str
    room: int
    _held: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The blocks, and where values come in and go out."""
        graph = self.program.entry(self.entry).graph
        self.blocks = split_blocks(graph, self.program.weights.specs)
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        [self.logits] = graph.output_node().all_input_nodes
        self._staying = staying(self.program, self.blocks, self.room)

    def many(self, calls: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Logits [B, S, V] for each batch's arguments of the entry."""
        return [found[self.logits] for found in self.run(calls, {self.logits})]

    @torch.no_grad()
    def run(self, calls: Sequence[Sequence[Tensor]], keep: Collection[fx.Node]) -> list[Values]:
        """The values of some nodes for each batch's arguments."""
        values: list[Values] = [dict(zip(self._inputs, call, strict=True)) for call in calls]
        for block in self.blocks:
            weights = self._weights(block)
            values = [self._through(block, weights, given, keep) for given in values]
            del weights  # before the next block's are read
            release_unused()
        return values

    def _weights(self, block: Block) -> dict[str, Tensor]:
        if block.index in self._held:
            return self._held[block.index]
        found, size = (
            self.program.loaded(str(node.target) for node in block.parameters),
            block_bytes(self.program, block),
        )
        if size <= self.room:
            self._held[block.index] = found
            self.room -= size
        return found

    def _through(self, block: Block, weights: dict[str, Tensor], given: Values, keep: Collection[fx.Node]) -> Values:
        """What flows on behind a block; a cache that lies elsewhere is brought here and taken back."""
        here = {node: _on(given[node], self.program.device) for node in block.inputs}
        values = {**here, **{node: weights[str(node.target)] for node in block.parameters}}
        found = evaluate(block.nodes, values, {*block.later, *keep}, device=self.program.device)
        for node, value in here.items():
            if node in self._inputs and value is not given[node]:
                given[node].copy_(value)
        return {node: value for node, value in {**found, **given}.items() if node in block.later or node in keep}


def staying(program: Program, blocks: Sequence[Block], room: int) -> dict[int, int]:
    """The blocks that stay in so many bytes beside the largest one at work: index -> bytes."""
    sizes = {block.index: block_bytes(program, block) for block in blocks}
    left, found = room - max(sizes.values()), dict[int, int]()
    for index, size in sizes.items():
        if size <= left:
            found[index], left = size, left - size
    return found


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
