"""What rotating an input would gain: a block's error on calibration text, with the rotation and without.

One input after the other, all planned matrices that read it are rounded, weights and, where the plan has them,
activations, and the rest of the block is computed as it is. With H the block Hadamard rotation, A the rounding of
activations and Q that of weights, for all W that read x:

    plain    mean over tokens of ||block(A(x) Q(W)^T) - block(x W^T)||^2
    rotated  mean over tokens of ||block(A(x H) Q(W H)^T) - block(x W^T)||^2

Before o the rotation is fused into v, which is rounded as Q(H^T W) then: v's rounding counts on both sides.

The error is that of what the block hands on, the residual stream, and not of x W^T: channels that v and up write large
and o and down read small would drown all others there, and the readers of one input would not have one unit.

Annotation `rotation_<block>_<activations>`: {format: [plain, rotated]}, the same for all readers of an input.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from aqtx.formats import Format
from aqtx.program.blocks import Block, Values
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity.measured import Request, annotate, has
from aqtx.sensitivity.rounded_run import Rounding, calibrated, results


def annotation(block: int, activation: str) -> str:
    """The key that the errors are kept under."""
    return f"rotation_{block}_{activation}"


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
    rounding = Rounding(program, block, context.seed, activation)
    with calibrated(program, context) as (runner, blocks, ids):
        readers = {part.index: readers_by_input(part, missing) for part in blocks}
        last = max(index for index, found in readers.items() if found)
        for part in context.progress(blocks[: last + 1], description="rotation"):
            weights = runner.load(part)
            exact = list(results(runner, part, weights, {}))
            for members in readers[part.index]:
                nodes = {site.node for site, _ in members}
                for fmt in dict.fromkeys(fmt for _, formats in members for fmt in formats):
                    readers_of_it = [(site, fmt) for site, formats in members if fmt in formats]
                    planned, errors = [*readers_of_it, *writers_in(fmt, nodes, missing, rounding)], []
                    for turned in (set(), nodes):
                        found = results(runner, part, weights, rounding.of(planned, turned))
                        errors.append(squared_difference(found, exact) / ids.numel())
                    for site, _ in readers_of_it:
                        annotate(site, key, {fmt.name: errors})
            for batch, values in enumerate(exact):
                runner.stream.write(batch, values)


def readers_by_input(block: Block, wanted: Sequence[Request]) -> list[list[Request]]:
    """The requests of a block, those for the readers of one input together."""
    nodes, found = set(block.nodes), dict[object, list[Request]]()
    for site, formats in wanted:
        if site.node in nodes:
            found.setdefault(site.node.args[0], []).append((site, formats))
    return list(found.values())


def writers_in(
    fmt: Format, nodes: Iterable[fx.Node], wanted: Sequence[Request], rounding: Rounding
) -> list[tuple[Site, Format]]:
    """v for o: its outputs turn where o's input does, so it is rounded otherwise; in `fmt` if it may take that."""
    writers = {rounding.writer(node) for node in nodes}
    return [(site, fmt if fmt in formats else formats[0]) for site, formats in wanted if site.node in writers]


def squared_difference(found: Iterable[Values], exact: Sequence[Values]) -> float:
    """Summed over batches, values, tokens and channels."""
    pairs = ((values[node], after[node]) for values, after in zip(exact, found, strict=True) for node in values)
    return sum(
        float((other.float() - one.float()).square().sum(dtype=torch.float64))
        for one, other in pairs
        if one.is_floating_point()
    )
