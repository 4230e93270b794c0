"""What rotating a matrix's input would gain: output errors on calibration text, with the rotation and without.

A sample of the rows that each matrix reads is kept, of an expert its own where it has enough of them.
The error is that of the rounded product, weights and, where the plan has them, activations:

    plain    mean over rows of ||A(x) Q(W)^T - x W^T||^2          A rounds x to the activations' format, Q the weights
    rotated  mean over rows of ||A(x H) Q(W H)^T - x W^T||^2      H the block Hadamard rotation

Annotation `rotation_<block>_<activations>`: {format: [plain, rotated]}, weighted by the share of tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.blocks import Block, evaluate, split_blocks
from aqtx.calibrate import Runner
from aqtx.formats import Format, fake_quantize
from aqtx.formats.activation import quantize_tokens
from aqtx.numerics.hadamard import hadamard
from aqtx.program import LINEAR, Program, Site
from aqtx.registry import Context
from aqtx.sensitivity.measured import Request, annotate, has
from aqtx.stream import Stream, scratch_folder

NUM_TOKENS = 2048  # of calibration text
ROWS = 256  # kept of a plain input, and of all experts together
EXPERT_ROWS = 64  # kept of each expert
ENOUGH = 16  # rows from which an expert is measured on its own


def annotation(block: int, activation: str) -> str:
    """The key that the errors are kept under."""
    return f"rotation_{block}_{activation}"


@dataclass
class Sample:
    """Rows that a node has read: of each expert, and of all together."""

    slots: int
    pooled: list[Tensor] = field(default_factory=list)
    own: dict[int, list[Tensor]] = field(default_factory=dict)
    counts: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, x: Tensor, offsets: Tensor | None, share: float) -> None:
        """Take rows [T, K]; `share` of `ROWS` may be kept of this batch."""
        stride = max(int(len(x) / max(ROWS * share, 1)), 1)
        self.pooled.append(x[::stride].float())
        ends = [len(x)] if offsets is None else offsets.tolist()
        starts = [0, *ends[:-1]]
        counts = torch.tensor([end - start for start, end in zip(starts, ends, strict=True)], dtype=torch.float64)
        self.counts = counts if not self.counts.numel() else self.counts + counts
        if offsets is not None:
            for expert, (start, end) in enumerate(zip(starts, ends, strict=True)):
                kept = sum(len(rows) for rows in self.own.get(expert, []))
                self.own.setdefault(expert, []).append(x[start : min(end, start + EXPERT_ROWS - kept)].float())

    def rows(self, expert: int | None) -> Tensor:
        """The rows [T, K] on which a matrix is measured."""
        own = torch.cat(self.own[expert]) if expert is not None else torch.empty(0)
        return own if len(own) >= ENOUGH else torch.cat(self.pooled)

    def share(self, expert: int | None) -> float:
        """Of this node's rows those that the matrix reads; 1 for a plain matrix."""
        return 1.0 if expert is None else float(self.counts[expert] / self.counts.sum())


def measure_rotations(
    program: Program, wanted: Sequence[Request], context: Context, *, block: int, activation: str = "none"
) -> None:
    """Annotate the sites whose width the block divides, and that lack the errors of their formats."""
    key = annotation(block, activation)
    missing = [
        (site, formats) for site, formats in wanted if site.shape[1] % block == 0 and not has(site, key, formats)
    ]
    if not missing:
        return
    formats_of = {site.name: formats for site, formats in missing}
    compare = Comparison(block, context.seed, None if activation == "none" else activation)
    for sites, sample in sampled(program, [site for site, _ in missing], context):
        for site in sites:
            W, x, share = program.read(site).to(context.device), sample.rows(site.expert), sample.share(site.expert)
            errors = compare.errors(W, x, formats_of[site.name])
            annotate(site, key, {name: [share * plain, share * rotated] for name, (plain, rotated) in errors.items()})


@dataclass(frozen=True)
class Comparison:
    """Output errors with a rotation and without."""

    block: int
    seed: int
    activation: str | None

    def errors(self, W: Tensor, x: Tensor, formats: Sequence[Format]) -> dict[str, tuple[float, float]]:
        """{format: (plain, rotated)} of W [N, K] on rows x [T, K]."""
        exact = x @ W.T
        turned_x, turned_W = (hadamard(value, self.block, seed=self.seed) for value in (x, W))
        inputs = (
            [x, turned_x] if self.activation is None else [quantize_tokens(v, self.activation) for v in (x, turned_x)]
        )
        return {
            fmt.name: (
                _mean_square(inputs[0] @ fake_quantize(W, fmt).T - exact),
                _mean_square(inputs[1] @ fake_quantize(turned_W, fmt).T - exact),
            )
            for fmt in formats
        }


def _mean_square(error: Tensor) -> float:
    return float(error.square().sum(dtype=torch.float64) / len(error))


def sampled(program: Program, sites: Sequence[Site], context: Context) -> Iterator[tuple[list[Site], Sample]]:
    """Each node's sites with the rows that it read, block by block."""
    by_node: dict[fx.Node, list[Site]] = {}
    for site in sites:
        by_node.setdefault(site.node, []).append(site)
    blocks = split_blocks(program.graph, program.weights.specs)
    last = max(block.index for block in blocks if by_node.keys() & set(block.nodes))
    ids = context.calibration()
    ids = ids[: max(NUM_TOKENS // ids.shape[1], 1)]
    with scratch_folder(context.work) as scratch:
        stream = Stream(len(ids), scratch if context.work is not None else None)
        runner = Runner(program, stream, context.device)
        runner.start(ids, 1)
        for block in context.progress(blocks[: last + 1], description="rotation"):
            samples = {node: Sample(by_node[node][0].slots) for node in block.nodes if node in by_node}
            _run_block(runner, block, samples)
            yield from ((by_node[node], sample) for node, sample in samples.items())


def _run_block(runner: Runner, block: Block, samples: dict[fx.Node, Sample]) -> None:
    """One block on all batches; its results go into the stream."""
    weights, share = runner.load(block), 1 / len(runner.stream)
    with torch.no_grad():
        for batch in range(len(runner.stream)):
            values = {**runner.stream.read(batch, runner.device), **weights}
            found = evaluate(block.nodes, values, set(block.later), device=runner.device, visit=_taker(samples, share))
            runner.stream.write(batch, {node: found[node] for node in block.later if node in found})


def _taker(samples: dict[fx.Node, Sample], share: float) -> Callable[[fx.Node, tuple[Any, ...]], None]:
    def visit(node: fx.Node, arguments: tuple[Any, ...]) -> None:
        if node in samples:
            offsets = None if node.target is LINEAR else arguments[2]
            samples[node].add(arguments[0].flatten(0, -2), offsets, share)

    return visit
