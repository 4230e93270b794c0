"""A model that trains one block at a time: weights are loaded for a block and let go, activations computed again.

Forward, only what flows between blocks stays. Backward, from the last block to the first, a block is loaded once more
and computed again, some sequences at a time, and gives gradients of what trains in it and of what flowed in.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.blockwise.work_size import stream_bytes
from aqtx.finetune.pieces import Piece, Weights, computed, piece_of
from aqtx.finetune.recompute import Part, recomputed
from aqtx.finetune.routed import Ends, Head, ends_of
from aqtx.machine.memory import release_unused
from aqtx.program.blocks import Values, split_blocks
from aqtx.program.program import Program

WAITING = 64 << 20  # bytes that may flow between two blocks at once where no gradient is wanted
Finish = Callable[[int, Values], list[Any]]  # a part's number and its values -> what goes on


@dataclass(frozen=True)
class Chain:
    """The student of a program, one block's weights and some sequences' activations in memory at a time.

    Args:
        program: rounded.
        pieces: its blocks.
        ends: its ids, logits and routers.
        rows: sequences that go through a block together.
    """

    program: Program
    pieces: tuple[Piece, ...]
    ends: Ends
    rows: int

    @classmethod
    def of(cls, program: Program, rows: int) -> "Chain":
        """All blocks, none of them loaded."""
        ends = ends_of(program, program.graph)
        blocks = split_blocks(program.graph, program.weights.specs)
        pieces = tuple(piece_of(block, program, ends.routers.values(), {}) for block in blocks)
        return cls(program, pieces, ends, rows)

    @property
    def routers(self) -> tuple[str, ...]:
        """The weights' names of its routers, in graph order."""
        return tuple(self.ends.routers)

    def together(self, length: int, batch_size: int) -> int:
        """As many as may wait between two blocks: a block is loaded once for all of them."""
        return max(batch_size, WAITING // max(stream_bytes(self.program, length), 1))

    def scored(self, ids: Tensor, trained: Weights, head: Head) -> Tensor:
        """What `head` makes of the outputs for ids [B, S], all its parts in order; `trained` replaces weights."""
        starts = range(0, len(ids), self.rows)
        slices = [slice(start, min(start + self.rows, len(ids))) for start in starts]
        values: list[Values] = [{self.ends.ids: ids[part]} for part in slices]
        for piece in self.pieces[:-1]:
            made = self._each(piece, values, piece.block.inputs, trained, _outputs_of(piece))
            values = [self._passed_on(piece, old, new) for old, new in zip(values, made, strict=True)]
        last = self.pieces[-1]

        def ended(index: int, found: Values) -> list[Tensor]:
            return [head(self.ends.outputs(found), slices[index])]

        inputs = (*last.block.inputs, *self.ends.routers.values())
        return torch.cat([value for [value] in self._each(last, values, inputs, trained, ended)])

    def _passed_on(self, piece: Piece, values: Values, made: Sequence[Any]) -> Values:
        """What flows on behind a piece: what later ones read, and router logits."""
        kept = {*piece.block.later, *self.ends.routers.values()}
        found = {**values, **dict(zip(piece.outputs, made, strict=True))}
        return {node: value for node, value in found.items() if node in kept}

    def _each(
        self, piece: Piece, values: list[Values], inputs: Iterable[fx.Node], trained: Weights, finish: Finish
    ) -> list[list[Any]]:
        """What `finish` makes of each part's values with those of the piece; gradients flow through `inputs`."""
        own = {name: value for name, value in trained.items() if name in piece.names}
        flowing = [node for node in inputs if getattr(values[0].get(node), "requires_grad", False)]

        def run(weights: Weights, masters: Weights, index: int, given: Sequence[Tensor]) -> list[Any]:
            known = {**values[index], **dict(zip(flowing, given, strict=True))}
            return finish(index, {**known, **piece(known, {**weights, **computed(self.program, masters)})})

        part = Part(partial(self.program.loaded, [name for name in piece.names if name not in own]), run, tuple(own))
        found = recomputed(part, own, [[known[node] for node in flowing] for known in values])
        release_unused()
        return found


def _outputs_of(piece: Piece) -> Finish:
    return lambda _, found: [found[node] for node in piece.outputs]
