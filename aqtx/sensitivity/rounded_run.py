"""Blocks of a model run with some of their linears rounded, weights and activations, and their inputs rotated.

Nothing of the program changes: nodes are given other weights and inputs while they are evaluated.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from aqtx.blockwise.block_runner import Runner
from aqtx.blockwise.block_stream import Stream, scratch_folder
from aqtx.formats import Format, fake_quantize
from aqtx.formats.activation import quantize_tokens
from aqtx.numerics.hadamard import hadamard
from aqtx.program.blocks import Block, Values, evaluate, split_blocks
from aqtx.program.program import Program
from aqtx.program.site import LINEAR, Site
from aqtx.registry import Context
from aqtx.rotation.attention_path import value_writer
from aqtx.rotation.row_ops import Unproven, weight_name

NUM_TOKENS = 4096  # of calibration text
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Rounding:
    """Rounds weights and activations, behind a rotation or not, as they are rounded once rotations are fused."""

    program: Program
    block: int  # of the rotation
    seed: int
    activation: str  # a format or none

    def of(self, planned: Sequence[tuple[Site, Format]], turned: Collection[fx.Node]) -> dict[fx.Node, "Reader"]:
        """What the nodes of planned sites compute with; of a stack the other experts are turned along, not rounded."""
        by_node: dict[fx.Node, dict[int | None, Format]] = {}
        for site, fmt in planned:
            by_node.setdefault(site.node, {})[site.expert] = fmt
        writers = {node: writer for node in turned if (writer := self.writer(node)) is not None}
        found = {}
        for node in by_node.keys() | set(turned) | set(writers.values()):
            inputs, outputs = node in turned, node in writers.values()
            turn = Turn(self.block, self.seed, inputs, outputs, online=inputs and node not in writers)
            found[node] = self._reader(node, by_node.get(node, {}), turn)
        return found

    def writer(self, node: fx.Node) -> fx.Node | None:
        """The linear whose outputs are turned instead of a node's inputs: v for o, where that is proven."""
        try:
            return value_writer(node, self.block) if node.target is LINEAR else None
        except Unproven:
            return None

    def _reader(self, node: fx.Node, formats: Mapping[int | None, Format], turn: "Turn") -> "Reader":
        store, name = self.program.weights, weight_name(node)
        spec = store.specs[name]
        experts = [None] if node.target is LINEAR else list(range(spec.shape[0]))
        matrices = []
        for expert in experts:
            W = turn.weight(store.precise(name, expert).to(self.program.device))
            W = fake_quantize(W, formats[expert]) if expert in formats else W
            matrices.append(W.to(spec.dtype))
        names = [self.activation if self.activation != "none" and expert in formats else "" for expert in experts]
        return Reader(matrices[0] if node.target is LINEAR else torch.stack(matrices), names, turn)


@dataclass(frozen=True)
class Turn:
    """Which sides of a matrix are rotated, and whether its input is rotated while the model runs."""

    block: int
    seed: int
    inputs: bool
    outputs: bool
    online: bool

    def weight(self, W: Tensor) -> Tensor:
        """W [N, K] turned."""
        W = hadamard(W, self.block, seed=self.seed) if self.inputs else W
        return hadamard(W.mT, self.block, seed=self.seed).mT if self.outputs else W


class Stand(Protocol):
    """Stands in for a linear."""

    def arguments(self, node: fx.Node, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """The node's arguments in place of those given."""


@dataclass(frozen=True)
class Reader:
    """A linear on a rounded weight, whose input is turned and rounded before."""

    weight: Tensor
    activations: list[str]  # a format by expert, empty: not rounded
    turn: Turn

    def arguments(self, node: fx.Node, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """The node's arguments in place of those given."""
        block, seed = self.turn.block, self.turn.seed
        x = hadamard(given[0], block, seed=seed) if self.turn.online else given[0]
        if node.target is not LINEAR:
            return (
                torch.ops.aqtx.quantize_activation_grouped(x, given[2], ",".join(self.activations)),
                self.weight,
                given[2],
            )
        x = quantize_tokens(x, self.activations[0]) if self.activations[0] else x
        biases = (bias for bias in given[2:] if bias is not None)
        return x, self.weight, *(hadamard(bias, block, seed=seed) if self.turn.outputs else bias for bias in biases)


@contextmanager
def calibrated(program: Program, context: Context) -> Iterator[tuple[Runner, list[Block], Tensor]]:
    """A runner with calibration sequences [n, T] in its stream, the model's blocks, and the sequences."""
    ids = context.calibration()
    ids = ids[: max(NUM_TOKENS // ids.shape[1], 1)]
    batch_size = max(BATCH_TOKENS // ids.shape[1], 1)
    with scratch_folder(context.work) as scratch:
        stream = Stream(-(-len(ids) // batch_size), scratch if context.work is not None else None)
        runner = Runner(program, stream, context.device)
        runner.start(ids, batch_size)
        yield runner, split_blocks(program.graph, program.weights.specs), ids


@torch.no_grad()
def results(runner: Runner, block: Block, weights: Values, readers: Mapping[fx.Node, Stand]) -> Iterator[Values]:
    """What a block hands on, batch by batch, with some of its linears replaced."""

    def visit(node: fx.Node, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return readers[node].arguments(node, given) if node in readers else None

    for batch in range(len(runner.stream)):
        values = {**runner.stream.read(batch, runner.device), **weights}
        kept = evaluate(block.nodes, values, block.later, device=runner.device, visit=visit)
        yield {node: kept[node] for node in block.later if node in kept}


def sequence_losses(
    rounding: Rounding, planned: Sequence[tuple[Site, Format]], turned: Collection[fx.Node], context: Context
) -> Tensor:
    """Nats a token of each calibration sequence [n], float64, with all planned sites rounded."""
    with calibrated(rounding.program, context) as (runner, blocks, ids):
        [logits] = rounding.program.graph.output_node().all_input_nodes
        losses: list[Tensor] = []
        for block in context.progress(blocks, description="rounded"):
            nodes = set(block.nodes)
            readers = rounding.of([(site, fmt) for site, fmt in planned if site.node in nodes], nodes & set(turned))
            for batch, values in enumerate(results(runner, block, runner.load(block), readers)):
                if block is not blocks[-1]:
                    runner.stream.write(batch, values)
                    continue
                targets = ids[sum(map(len, losses)) :][: len(values[logits]), 1:].to(runner.device)
                scores = values[logits][:, :-1].float().mT
                losses.append(torch.nn.functional.cross_entropy(scores, targets, reduction="none").double().mean(1))
    return torch.cat(losses).cpu()
