"""A backward pass over calibration text, set up: batches, and where the values between blocks are kept."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, fx

from aqtx.blockwise.backward import Backward
from aqtx.blockwise.block_runner import Runner
from aqtx.blockwise.block_stream import Stream, scratch_folder
from aqtx.blockwise.linear_rows import mixes_nothing
from aqtx.blockwise.work_size import activation_bytes, sequences_at_once, stream_bytes
from aqtx.formats import Format, fake_quantize
from aqtx.program.blocks import Block, Values, split_blocks
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context

TOKENS_PER_BATCH = 2048


@contextmanager
def text_gradients(
    program: Program,
    users: Mapping[str, list[fx.Node]],
    ids: Tensor,
    context: Context,
    rounded: Sequence[tuple[Site, Format]] = (),
) -> Iterator[Backward]:
    """A pass over the sequences ids [n, T] that gives the rows of these linears; its folder is gone afterwards.

    Ranks share the batches: each sees the rows of its own. Sites that are `rounded` have the values of round-to-nearest
    for the while.
    """
    nodes = frozenset(node for found in users.values() for node in found)
    blocks = split_blocks(program.graph, program.weights.specs)
    length = ids.shape[1]
    most = TOKENS_PER_BATCH // length if mixes_nothing(nodes, blocks) else 1
    together = sequences_at_once(program, blocks, length, most)
    sizes = [len(part) for part in ids.split(together)]
    kept_bytes = len(blocks) * stream_bytes(program, ids.numel()) + activation_bytes(program, blocks) * ids.numel()
    on_disk = kept_bytes > context.room() // 4
    with scratch_folder(context.work) as scratch:
        folder = scratch if on_disk else None
        runner = _Rounded(program, Stream(len(sizes), folder, keep=True), context.device, context.ranks, rounded)
        runner.start(ids, together)
        yield Backward(runner, blocks, nodes, sizes, folder)


@dataclass
class _Rounded(Runner):
    """Runs blocks with some of their matrices rounded."""

    rounded: Sequence[tuple[Site, Format]] = ()

    def load(self, block: Block) -> Values:
        """The block's parameters, copies that may be written to."""
        values = super().load(block)
        by_name = {str(node.target): values[node] for node in block.parameters}
        for site, fmt in self.rounded:
            if site.weight in by_name:
                W = by_name[site.weight] if site.expert is None else by_name[site.weight][site.expert]
                W.copy_(fake_quantize(self.program.read(site).to(W.device), fmt))
        return values
