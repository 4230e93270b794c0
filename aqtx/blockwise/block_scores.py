"""Logits of many token sequences from a model that need not fit into memory.

All sequences advance together: a block's weights are read once, every batch goes through it, and what it hands on waits
in memory or on disk. A model that fits is one block, whose weights stay from call to call: the same code.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from aqtx.blockwise.block_runner import Runner
from aqtx.blockwise.block_stream import Stream, scratch_folder
from aqtx.blockwise.work_size import parameter_bytes, stream_bytes, tokens_at_once
from aqtx.formats import dequantized
from aqtx.machine.files import text_digest
from aqtx.machine.memory import release_unused
from aqtx.machine.ranks import ALONE, Ranks
from aqtx.program.blocks import Block, Values, evaluate, split_blocks, whole
from aqtx.program.program import Program
from aqtx.program.token_ids import check_ids, check_length

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
        record: what to call the file in `work` from which a killed run goes on with the next block, None for no file.
    """

    program: Program
    room: int
    work: Path | None = None
    progress: Progress = lambda items, **_: items
    ranks: Ranks = ALONE
    record: str | None = None
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
        check_ids(self.program, batches, "text")
        check_length(self.program, max(ids.shape[-1] for ids in batches), "the window")
        on_disk = stream_bytes(self.program, sum(ids.numel() for ids in batches)) > self.room // 8
        with scratch_folder(self.work) as scratch:
            runner = Runner(self.program, Stream(len(batches), scratch if on_disk else None), self.program.device)
            file = self._record_of(batches)
            done = self._start(runner.stream, batches, file)
            for index, block in enumerate(self.progress(self.blocks[done:-1], description="blocks"), done + 1):
                runner.advance(block, self.load(runner, block))
                if file is not None:
                    runner.stream.save(file, index)
                release_unused()
            yield from self._last(runner, self.blocks[-1])
        if file is not None:
            file.unlink(missing_ok=True)
        release_unused()

    def broken_weight(self) -> str | None:
        """The first parameter that holds NaN or infinity as it was read; reads all of them."""
        weights = self.program.weights
        values = ((name, dequantized(weights.get(name))) for name in weights.names())
        return next((name for name, value in values if not bool(value.isfinite().all())), None)

    def load(self, runner: Runner, block: Block) -> Values:
        """A block's parameters."""
        return runner.load_as_stands(block)

    def _record_of(self, batches: Sequence[Tensor]) -> Path | None:
        """The file of this text's record; a resident model is one block and needs none."""
        if self.work is None or self.record is None or not self.streams:
            return None
        digest = text_digest(json.dumps([ids.tolist() for ids in batches]))
        return self.work / f"{self.record}-{digest[:16]}.safetensors"

    def _start(self, stream: Stream, batches: Sequence[Tensor], file: Path | None) -> int:
        """Fill the stream, with what a killed run left or with the ids; how many blocks are done."""
        done = None if file is None else stream.restore(file, self.program.graph)
        if done is not None:
            return int(done)
        [placeholder] = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        for index, ids in enumerate(batches):
            stream.write(index, {placeholder: ids})
        return 0

    def _last(self, runner: Runner, block: Block) -> Iterator[Tensor]:
        [logits] = self.program.graph.output_node().all_input_nodes
        weights = self._resident or self.load(runner, block)
        if not self.streams:
            self._resident = weights
        for batch in range(len(runner.stream)):
            values = {**runner.stream.read(batch, runner.device), **weights}
            yield self._logits(block, values, logits)
            release_unused()  # batches of many lengths leave a heap full of holes

    def _logits(self, block: Block, values: Values, logits: fx.Node) -> Tensor:
        found: Tensor = evaluate(block.nodes, values, {logits}, device=self.program.device)[logits]
        return found


def many_with(forward: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Tensor]], Iterator[Tensor]]:
    """A way to score many batches, block by block where the model is one that can be."""
    return forward.many if isinstance(forward, BlockScorer) else lambda batches: map(forward, batches)


def ranks_of(forward: Callable[[Tensor], Tensor]) -> Ranks:
    """The ranks that score together."""
    return forward.ranks if isinstance(forward, BlockScorer) else ALONE


def why_not_finite(forward: Callable[[Tensor], Tensor]) -> str:
    """What made a model's predictions NaN or infinite, as far as it can be told."""
    name = forward.broken_weight() if isinstance(forward, BlockScorer) else None
    return "a weight is not, or activations overflow" if name is None else f"{name} holds NaN or infinity"


def rows_at_once(forward: Callable[[Tensor], Tensor], length: int, most: int) -> int:
    """How many sequences of so many tokens go into one batch, at most `most`."""
    return min(most, max(forward.max_tokens // max(length, 1), 1)) if isinstance(forward, BlockScorer) else most
