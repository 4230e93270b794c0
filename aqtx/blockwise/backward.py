"""What a loss says of every linear's output, from the last block back to the first, one block's weights at a time.

Forward, a stream keeps what flows into each block. Backward, a block is computed again from there, and autograd
takes the gradient from its results to its inputs and to the outputs of the linears asked for. Weights get no gradient:
that of W is sum_t d_t x_t^T, and whoever wants it has the rows x and d of one block at a time, in memory or on disk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.blockwise.block_runner import Runner
from aqtx.blockwise.block_stream import Mark
from aqtx.blockwise.linear_rows import Rows, Taps
from aqtx.blockwise.shelf import Shelf
from aqtx.machine.memory import release_unused
from aqtx.program.blocks import Block, Values, evaluate

Head = Callable[[Tensor, int], Tensor]  # logits [B, T, V] of a batch -> the loss's gradient for them
Progress = Callable[..., Iterator[Any]]


@dataclass
class Backward:
    """One forward and one backward pass; `runner`'s stream must keep its values, and hold the ids already."""

    runner: Runner
    blocks: list[Block]
    wanted: frozenset[fx.Node]  # linears
    sizes: list[int]  # sequences of each batch
    folder: Path | None  # for rows and gradients, None: memory
    _marks: list[Mark] = field(default_factory=list)
    _moving: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        """What depends on a linear that is asked for carries a gradient; all else need not."""
        self.rows = Shelf(None if self.folder is None else self.folder / "rows")
        self.gradients = Shelf(None if self.folder is None else self.folder / "gradients")
        self._by_node = {node: block for block in self.blocks for node in block.nodes}
        for node in self.runner.program.graph.nodes:
            if node in self.wanted or any(source in self._moving for source in node.all_input_nodes):
                self._moving.add(node)

    @property
    def depth(self) -> int:
        """The first block with a linear that is asked for: no gradient goes further back."""
        return min(self._by_node[node].index for node in self.wanted)

    def forward(self, progress: Progress, done: int | None = None) -> None:
        """Fill the stream with the inputs of every block, or of those before `done`, the last one that is finished."""
        self._marks.append(self.runner.stream.mark())
        needed = len(self.blocks) - 1 if done is None else max(done - 1, 0)
        for block in progress(self.blocks[:needed], description="forward"):
            self.runner.advance(block, self.runner.load(block))
            self._marks.append(self.runner.stream.mark())
        release_unused()

    def backward(self, head: Head, progress: Progress, done: int | None = None) -> Iterator[Block]:
        """Yields each block once its rows are there, until the next is asked for; those from `done` on are finished."""
        for block in progress(self.blocks[self.depth : done][::-1], description="backward"):
            self._run_block(block, head)
            release_unused()  # of the block's weights and activations
            yield block
            for batch in self.runner.batches:
                self.rows.drop(str(batch))
            release_unused()

    def rows_of(self, node: fx.Node) -> Iterator[tuple[int, Rows]]:
        """Batches with the rows that a linear of the block just yielded saw."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        for batch in self.runner.batches:
            found = self.rows.get(str(batch), self.runner.device)
            sequence, offsets = found[f"sequence.{node.name}"], found.get(f"offsets.{node.name}")
            yield batch, Rows(found[f"x.{source.name}"], found[f"d.{node.name}"], sequence, offsets)

    def _run_block(self, block: Block, head: Head) -> None:
        self.runner.stream.rewind(self._marks[block.index])
        weights = self.runner.load(block)
        for batch in self.runner.batches:
            self._run_batch(block, batch, weights, head)
            release_unused()  # of its graph, before the next batch makes one

    def _run_batch(self, block: Block, batch: int, weights: Values, head: Head) -> None:
        values = self.runner.stream.read(batch, self.runner.device)
        inputs = {node: values[node].detach().requires_grad_() for node in block.inputs if self._flows(node, values)}
        taps = Taps(block, self.wanted)
        found = self._again(block, {**values, **inputs, **weights}, taps)
        later = self._later(block, batch, found, head)
        into = [*inputs.values(), *taps.outputs(found).values()]
        own = [node for node in later if node in found and found[node].requires_grad and node not in values]
        gradients = torch.autograd.grad(
            [found[node] for node in own], into, [later[node] for node in own], allow_unused=True
        )
        incoming = {node: value for node, value in later.items() if node in values}
        for node, gradient in zip(inputs, gradients, strict=False):
            if gradient is not None:
                incoming[node] = gradient + incoming[node] if node in incoming else gradient
        self.gradients.put(str(batch), {node.name: value for node, value in incoming.items()})
        self.rows.put(str(batch), taps.told(found, gradients[len(inputs) :], self.sizes[batch]))

    def _flows(self, node: fx.Node, values: Values) -> bool:
        return node in self._moving and isinstance(values[node], Tensor) and values[node].is_floating_point()

    def _again(self, block: Block, values: Values, taps: "Taps") -> Values:
        """The block's results and what the taps want, with a graph for autograd."""
        keep = taps.keep | set(block.later)
        with torch.enable_grad():
            return evaluate(block.nodes, values, keep, device=self.runner.device, visit=taps.visit)

    def _later(self, block: Block, batch: int, found: Values, head: Head) -> dict[fx.Node, Tensor]:
        """The gradients that came back from behind the block."""
        if block is self.blocks[-1]:
            [logits] = self.runner.program.graph.output_node().all_input_nodes
            return {logits: head(found[logits].detach(), batch)}
        held = self.gradients.get(str(batch), self.runner.device)
        return {node: held[node.name] for node in block.later if node.name in held}
