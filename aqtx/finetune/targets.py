"""What the unquantized model says of the sequences that are trained and measured on, without holding it.

Each sequence goes through the model once, one block's weights in memory at a time, as far as the last block. What flows
into that, and all router logits, wait in memory or on disk; logits are made of them when asked for, since those of all
sequences would take more room than all else.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from aqtx.blockwise.block_stream import Stream, scratch_folder
from aqtx.blockwise.work_size import stream_bytes
from aqtx.finetune.pieces import Piece, piece_of
from aqtx.finetune.routed import Ends, Outputs, ends_of, router_sites, side
from aqtx.machine.memory import release_unused
from aqtx.program.blocks import split_blocks
from aqtx.program.program import Program
from aqtx.registry import Context

SHARE = 8  # of the room that may wait in memory


@dataclass(frozen=True)
class Targets:
    """The teacher's outputs by sequence: `stream` stands before its last piece."""

    stream: Stream
    last: Piece
    ends: Ends
    weights: dict[str, Tensor]
    device: torch.device

    @torch.no_grad()
    def __call__(self, places: Sequence[int]) -> Outputs:
        """Logits [b, S, V] and router logits [b * S, E] of sequences by their numbers."""
        found = [self._one(place) for place in places]
        logits = torch.cat([one[0] for one in found])
        return logits, tuple(torch.cat(layer) for layer in zip(*(one[1] for one in found), strict=True))

    def _one(self, place: int) -> Outputs:
        values = self.stream.read(place, self.device)
        return self.ends.outputs({**values, **self.last(values, self.weights)})


@contextmanager
def targets_of(program: Program, ids: Tensor, context: Context) -> Iterator[Targets]:
    """The outputs of the program's unquantized side for sequences ids [n, S]; its folder is gone afterwards."""
    view, graph = side(program, rounded=False)
    ends, blocks = ends_of(program, graph), split_blocks(graph, program.weights.specs)
    pieces = [piece_of(block, view, ends.routers.values(), {}) for block in blocks]
    with scratch_folder(context.work) as scratch:
        on_disk = waiting_bytes(program, ids.numel()) > context.room() // SHARE
        stream = Stream(len(ids), scratch if on_disk else None)
        for index, sequence in enumerate(ids.split(1)):
            stream.write(index, {ends.ids: sequence})
        for piece in context.progress(pieces[:-1], description="unquantized model"):
            _advance(view, piece, stream, ends.routers.values())
        yield Targets(stream, pieces[-1], ends, view.loaded(pieces[-1].names), view.device)


def waiting_bytes(program: Program, num_tokens: int) -> int:
    """What waits of the teacher for so many tokens."""
    scores = sum(site.shape[0] for site in router_sites(program))
    return stream_bytes(program, num_tokens) + num_tokens * scores * program.dtype.itemsize


@torch.no_grad()
def _advance(view: Program, piece: Piece, stream: Stream, routers: Iterable[fx.Node]) -> None:
    """All sequences through one piece; router logits wait in the stream until its end."""
    weights, kept = view.loaded(piece.names), {*piece.block.later, *routers}
    for index in range(len(stream)):
        values = stream.read(index, view.device)
        every = {**values, **piece(values, weights)}
        stream.write(index, {node: value for node, value in every.items() if node in kept})
    release_unused()
