"""What calibration text says of each matrix's inputs: how strong each channel is, and how often an expert is asked.

One run over the text, block by block: one block's weights and one residual stream are resident, and of each
input only the sums of squares per channel are kept (the diagonal of the Hessian H = sum x x^T). Annotations:

    hessian      {format: sum_nk h_k (W - Q)_nk^2}, h_k the channel's mean square over all tokens of the text
    frequency    share of the tokens that reach the matrix, 1 outside experts
    gate_weight  the expert's gate scores summed over its tokens, per token of the text; 1 outside experts
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.blockwise.block_runner import Runner
from aqtx.blockwise.block_stream import Stream, scratch_folder
from aqtx.errors import InputError
from aqtx.program.blocks import Block, Values, evaluate, split_blocks
from aqtx.program.gate_scores import GateScores, find_gate_scores
from aqtx.program.program import Program
from aqtx.program.site import LINEAR, Site
from aqtx.registry import Context
from aqtx.sensitivity.measured import Request, annotate, has, weighted_errors

TOKENS_PER_BATCH = 2048


@dataclass
class _Inputs:
    """Sums over the rows that a node has seen: per expert, squares of each channel, rows and gate scores."""

    slots: int
    offsets: fx.Node | None
    scores: GateScores | None
    squares: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    gates: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, arguments: tuple[Any, ...]) -> None:
        """Take a node's arguments (x, W[, offsets])."""
        x = arguments[0].flatten(0, -2).float()
        if not self.squares.numel():
            self.squares = x.new_zeros(self.slots, x.shape[1])
            self.rows, self.gates = x.new_zeros(self.slots), x.new_zeros(self.slots)
        expert = _experts_of_rows(x, arguments[2] if self.offsets is not None else None)
        self.squares.index_add_(0, expert, x.square())
        self.rows += torch.bincount(expert, minlength=self.slots)

    def add_gates(self, values: Values) -> None:
        """Take the gate scores of the same rows."""
        if self.scores is not None and self.offsets is not None:
            weights = self.scores.weights(values)
            self.gates.index_add_(0, _experts_of_rows(weights, values[self.offsets]), weights.to(self.gates))


def _experts_of_rows(rows: Tensor, offsets: Tensor | None) -> Tensor:
    """The expert of each of the sorted rows; 0 for a plain matrix."""
    index = torch.arange(len(rows), device=rows.device)
    return torch.zeros_like(index) if offsets is None else torch.searchsorted(offsets.long(), index, right=True)


def measure_inputs(program: Program, wanted: Sequence[Request], context: Context) -> None:
    """Annotate the sites that lack `hessian` for their formats; without such sites no text is read."""
    missing = [(site, formats) for site, formats in wanted if not has(site, "hessian", formats)]
    if not missing:
        return
    num_tokens = context.calibration().numel()
    formats_of = {site.name: formats for site, formats in missing}
    for sites, seen in _walk(program, [site for site, _ in missing], context):
        for site in sites:
            slot = site.expert or 0
            importance = seen.squares[slot] / num_tokens
            annotate(site, "hessian", weighted_errors(program, site, formats_of[site.name], importance))
            site.set("frequency", float(seen.rows[slot]) / num_tokens if site.expert is not None else 1.0)
            site.set("gate_weight", float(seen.gates[slot]) / num_tokens if seen.scores is not None else 1.0)


def _walk(program: Program, sites: Sequence[Site], context: Context) -> Iterator[tuple[list[Site], _Inputs]]:
    """Each node's sites with what it saw, block by block."""
    by_node: dict[fx.Node, list[Site]] = {}
    for site in sites:
        by_node.setdefault(site.node, []).append(site)
    blocks = split_blocks(program.graph, program.weights.specs)
    last = max(block.index for block in blocks if by_node.keys() & set(block.nodes))
    ids = context.calibration()
    batch_size = max(TOKENS_PER_BATCH // ids.shape[1], 1)
    with scratch_folder(context.work) as scratch:
        stream = Stream(-(-len(ids) // batch_size), scratch if context.work is not None else None)
        runner = Runner(program, stream, context.device)
        runner.start(ids, batch_size)
        for block in context.progress(blocks[: last + 1], description="inputs"):
            seen = {node: _inputs_of(by_node[node][0], block) for node in block.nodes if node in by_node}
            _run_block(runner, block, seen)
            yield from ((by_node[node], inputs) for node, inputs in seen.items())


def _inputs_of(site: Site, block: Block) -> _Inputs:
    if site.node.target is LINEAR:
        return _Inputs(1, None, None)
    offsets = site.node.args[2]
    assert isinstance(offsets, fx.Node)
    try:
        scores = find_gate_scores(offsets, block.nodes, 1)
    except InputError:  # a router whose scores are not where they usually are: frequencies still count
        scores = None
    return _Inputs(site.slots, offsets, scores)


def _run_block(runner: Runner, block: Block, seen: dict[fx.Node, _Inputs]) -> None:
    """One block on all batches; its results go into the stream."""
    weights = runner.load(block)
    reads = {node for inputs in seen.values() if inputs.scores for node in (*inputs.scores.nodes, inputs.offsets)}

    def visit(node: fx.Node, arguments: tuple[Any, ...]) -> None:
        if node in seen:
            seen[node].add(arguments)

    with torch.no_grad():
        for batch in range(len(runner.stream)):
            values = {**runner.stream.read(batch, runner.device), **weights}
            keep = set(block.later) | {node for node in reads if node is not None}
            found = evaluate(block.nodes, values, keep, device=runner.device, visit=visit)
            for inputs in seen.values():
                inputs.add_gates(found)
            runner.stream.write(batch, {node: found[node] for node in block.later if node in found})
