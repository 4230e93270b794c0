"""Logits of many token sequences from a model that need not fit into memory.

All sequences advance together: a block's weights are read once, every batch goes through it, and what it hands on waits
in memory or on disk. A model that fits is one block, whose weights stay from call to call: the same code.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.blockwise.block_runner import Runner
from aqtx.blockwise.block_stream import Stream, scratch_folder
from aqtx.blockwise.work_size import parameter_bytes, stream_bytes, tokens_at_once
from aqtx.machine.memory import release_unused
from aqtx.machine.ranks import ALONE, Ranks
from aqtx.program.blocks import Block, Values, evaluate, split_blocks, whole
from aqtx.program.program import Program

Progress = Callable[..., Iterable[Any]]
RESIDENT_SHARE = 2  # a model that takes a half of the room stays in memory: activations need the rest


@dataclass
class BlockScorer:
    """Scores token ids with a program as it stands.

    Args:
        program: not changed while the scorer lives.
        room: bytes that may be taken.
        work: folder for what waits between blocks, None for a temporary one.
        ranks: that share the batches of a text; all of them score it.
    """

    program: Program
    room: int
    work: Path | None = None
    progress: Progress = lambda items, **_: items
    ranks: Ranks = ALONE
    _resident: Values = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Whether the model fits."""
        self.model_bytes = parameter_bytes(self.program, self.program.weights.specs)
        self.streams = self.model_bytes > self.room // RESIDENT_SHARE
        blocks = split_blocks(self.program.graph, self.program.weights.specs)
        self.max_tokens = tokens_at_once(self.program, blocks)
        self.blocks = blocks if self.streams else [whole(self.program.graph)]

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> logits [B, S, V]."""
        return next(self.many([ids]))

    @torch.no_grad()
    def many(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Logits [B, S, V] of each batch of ids [B, S], in order; batches of up to `max_tokens` are best."""
        if not batches:
            return
        on_disk = stream_bytes(self.program, sum(ids.numel() for ids in batches)) > self.room // 8
        with scratch_folder(self.work) as scratch:
            runner = Runner(self.program, Stream(len(batches), scratch if on_disk else None), self.program.device)
            [placeholder] = [node for node in self.program.graph.nodes if node.op == "placeholder"]
            for index, ids in enumerate(batches):
                runner.stream.write(index, {placeholder: ids})
            for block in self.progress(self.blocks[:-1], description="blocks"):
                runner.advance(block, runner.load_as_stands(block))
                release_unused()
            yield from self._last(runner, self.blocks[-1])
        release_unused()

    def _last(self, runner: Runner, block: Block) -> Iterator[Tensor]:
        [logits] = self.program.graph.output_node().all_input_nodes
        weights = self._resident or runner.load_as_stands(block)
        if not self.streams:
            self._resident = weights
        for batch in range(len(runner.stream)):
            values = {**runner.stream.read(batch, runner.device), **weights}
            yield self._logits(block, values, logits)

    def _logits(self, block: Block, values: Values, logits: fx.Node) -> Tensor:
        found: Tensor = evaluate(block.nodes, values, {logits}, device=self.program.device)[logits]
        return found


def many_with(forward: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Tensor]], Iterator[Tensor]]:
    """A way to score many batches, block by block where the model is one that can be."""
    return forward.many if isinstance(forward, BlockScorer) else lambda batches: map(forward, batches)


def ranks_of(forward: Callable[[Tensor], Tensor]) -> Ranks:
    """The ranks that score together."""
    return forward.ranks if isinstance(forward, BlockScorer) else ALONE


def rows_at_once(forward: Callable[[Tensor], Tensor], length: int, most: int) -> int:
    """How many sequences of so many tokens go into one batch, at most `most`."""
    return min(most, max(forward.max_tokens // max(length, 1), 1)) if isinstance(forward, BlockScorer) else most
