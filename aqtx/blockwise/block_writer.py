"""Text from a model that does not fit into memory: all sequences grow together, and a token is a walk over the blocks.

What is drawn is what `aqtx.program.generate` draws batch by batch. It takes as long as reading the model once for each
token; the caches wait in memory, or in files where they take much of it.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from aqtx.blockwise.block_steps import BlockSteps
from aqtx.blockwise.block_stream import scratch_folder
from aqtx.blockwise.work_size import parameter_bytes
from aqtx.errors import InputError
from aqtx.program.cache_spec import CacheSpec, of_graph
from aqtx.program.generate import Generator, Sampling, Writes
from aqtx.program.program import Program
from aqtx.text.expert_choices import Choices, Routed, Routes, vocabulary_of

CACHE_SHARE = 4  # of the room that caches may take in memory
HELD_SHARE = 2  # of the room that weights may take: activations need the rest


class Progress(Protocol):
    """Wraps what is gone through."""

    def __call__(self, items: Iterable[int], *, description: str) -> Iterable[int]:
        """The same items."""


def writer_of(program: Program, room: int, work: Path | None, progress: Progress) -> Writes:
    """What writes a program's own text in so many bytes."""
    if parameter_bytes(program, program.weights.specs) <= room // HELD_SHARE:
        return Generator(program)
    return BlockWriter(program, room, work, progress)


def routes_of(program: Program, room: int) -> Routes:
    """What tells a program's choices of experts in so many bytes."""
    fits = parameter_bytes(program, program.weights.specs) <= room // HELD_SHARE
    return Routed(program) if fits else BlockRoutes(program)


class BlockRoutes:
    """Steps one block at a time that tell which experts were chosen; the caches take what memory there is."""

    def __init__(self, program: Program) -> None:
        self._steps, self._choices = BlockSteps(program, "step", 0), Choices(program.entry("step").graph)
        self.device, self.num_tokens = program.device, vocabulary_of(program, "step")
        self.caches = of_graph(program.entry("step"))

    def read(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [rows, S, V], and counts [rows, L, E] of the tokens that each expert gets."""
        [found] = self._steps.run([inputs], {self._steps.logits, *self._choices.nodes})
        chosen = [found[node] for node in self._choices.nodes]
        return found[self._steps.logits], self._choices.usage(chosen, len(inputs[0]))


class BlockWriter:
    """Writes all batches together.

    Args:
        program: the model; without a cache each token costs a pass over the whole text.
        room: bytes that may be taken.
        work: folder for caches, None for a temporary one.
        progress: wraps the tokens.
    """

    at_once = sys.maxsize

    def __init__(self, program: Program, room: int, work: Path | None, progress: Progress) -> None:
        self._program, self._room, self._work, self._progress = program, room, work, progress
        self._specs: list[CacheSpec] = []
        try:
            self._steps = BlockSteps(program, "step", room // HELD_SHARE)
        except InputError:  # a model of transformers
            self._steps = BlockSteps(program, "score", room // HELD_SHARE)
            return
        self._specs = of_graph(program.entry("step"))

    def mean_next(self, first: Tensor, *, batch_size: int = 64) -> Tensor:
        """The mean distribution [V], float64, of the token that follows first tokens [B, S]."""
        batches = first.split(batch_size)
        with scratch_folder(self._work) as scratch:
            caches = self._caches([len(batch) for batch in batches], first.shape[1], scratch)
            found = self._steps.many(self._calls(batches, 0, caches))
        total = torch.zeros(())
        for logits in found:
            total = total + logits[:, -1].double().softmax(-1).sum(0).cpu()
        return total / len(first)

    def write_each(
        self, firsts: Sequence[Tensor], length: int, sampling: Sampling, randoms: Sequence[torch.Generator]
    ) -> list[Tensor]:
        """Sequences [B, length] of each batch that go on from first tokens [B, S]; each draws from its own numbers."""
        texts, start = list(firsts), firsts[0].shape[1]
        with scratch_folder(self._work) as scratch:
            caches = self._caches([len(batch) for batch in firsts], length, scratch)
            for place in self._progress(range(start, length), description="own text, one block at a time"):
                done = place - 1 if self._specs and place > start else 0  # what the caches know
                found = self._steps.many(self._calls([ids[:, done:] for ids in texts], done, caches))
                drawn = [sampling.pick(logits[:, -1], random) for logits, random in zip(found, randoms, strict=True)]
                texts = [torch.cat([ids, new.unsqueeze(-1)], dim=1) for ids, new in zip(texts, drawn, strict=True)]
        return texts

    def _calls(self, batches: Sequence[Tensor], done: int, caches: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """The entry's arguments for the tokens behind the first `done`."""
        if not self._specs:
            return [[ids] for ids in batches]
        return [
            [ids, torch.arange(done, done + ids.shape[1]), torch.zeros(len(ids), dtype=torch.long), *cache]
            for ids, cache in zip(batches, caches, strict=True)
        ]

    def _caches(self, sizes: Sequence[int], slots: int, scratch: Path) -> list[list[Tensor]]:
        """A cache for each batch, in files where all of them take much of the room."""
        total = sum(spec.num_bytes(batch, slots) for batch in sizes for spec in self._specs)
        if total <= self._room // CACHE_SHARE:
            return [[spec.make(batch, slots, self._program.device) for spec in self._specs] for batch in sizes]
        scratch.mkdir(parents=True, exist_ok=True)
        return [
            [spec.make_mapped(batch, slots, scratch / f"cache-{row}-{place}") for place, spec in enumerate(self._specs)]
            for row, batch in enumerate(sizes)
        ]
