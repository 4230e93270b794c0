"""Calibration text that the model writes itself, by plain sampling: `calibration: {source: self}`.

Each sequence begins with what the tokenizer puts before a text and one more token, and is drawn from the model's own
distribution. No data is needed, and what is measured on such text is measured where the model itself would go.

First tokens (`starts`) are spread over the vocabulary: `uniform`, all tokens alike, without replacement until the
vocabulary is used up; `frequency`, by how often the model itself would write them, which is the mean of its
next-token distributions behind tokens of the first kind; the default, since text from uniform starts may all but miss a
domain that the model knows (measured: benchmarks/data_free.py).

Sequences are written in batches, each with a seed of its own and kept as a file when it is done, so that a run which
was stopped goes on with the next batch and the same text.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aqtx.program.generate import Generator, Sampling
from aqtx.program.program import Program
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.tokens import check_room

FILE_NAME = "self.jsonl"
BATCH = 64  # sequences written side by side
PROBES = 1024  # first tokens whose continuations tell the frequencies
Progress = Callable[..., Iterable[int]]


@dataclass(frozen=True)
class _Writer:
    """Writes batches of one calibration text."""

    program: Program
    spec: CalibrationSpec
    seed: int
    start: tuple[int, ...]  # what the tokenizer puts before every text

    def first_tokens(self, generator: Generator) -> Tensor:
        """The first token of each sequence [num_sequences], behind `start`."""
        random = torch.Generator().manual_seed(self.seed)
        vocabulary = self._vocabulary()
        rounds = -(-self.spec.num_sequences // vocabulary)
        uniform = torch.cat([torch.randperm(vocabulary, generator=random) for _ in range(rounds)])
        if self.spec.starts == "uniform":
            return uniform[: self.spec.num_sequences]
        probes = torch.randperm(vocabulary, generator=random)[:PROBES]
        shares = generator.mean_next(self._behind_start(probes))
        return shares.multinomial(self.spec.num_sequences, replacement=True, generator=random)

    def batch(self, generator: Generator, index: int, first: Tensor) -> Tensor:
        """Sequences [B, length] of one batch; they depend on the seed and its index alone."""
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        sampling = Sampling(temperature=self.spec.temperature)
        return generator.write(self._behind_start(first), self.spec.sequence_length, sampling, random)

    def _behind_start(self, tokens: Tensor) -> Tensor:
        start = torch.tensor(self.start, dtype=torch.long).expand(len(tokens), -1)
        return torch.cat([start, tokens.unsqueeze(-1)], dim=1)

    def _vocabulary(self) -> int:
        return int(self.program.entry("score").graph.output_node().all_input_nodes[0].meta["val"].shape[-1])


def calibration(
    program: Program,
    spec: CalibrationSpec,
    seed: int,
    folder: Path | None,
    *,
    start: Sequence[int] = (),
    progress: Progress | None = None,
) -> Tensor:
    """Calibration ids [num_sequences, sequence_length], written by the model.

    Args:
        program: the model; one without a cache writes too, at the cost of a pass over the whole text per token.
        spec: how many sequences, how long, at which temperature, from which first tokens.
        seed: the same seed gives the same text, whether the run was interrupted or not.
        folder: batches are kept here, and the whole as `self.jsonl`, which later runs read as a text source.
        start: what the model's tokenizer puts before every text (`aqtx.text.tokens.start_of`).
        progress: wraps the batches.
    """
    check_room(spec, [*start, 0])
    whole = None if folder is None else folder / FILE_NAME
    if whole is not None and whole.exists():
        return _read(whole)
    writer, generator = _Writer(program, spec, seed, tuple(start)), Generator(program)
    parts, batches = [], range(-(-spec.num_sequences // BATCH))
    for index in progress(batches, description="own text") if progress is not None else batches:
        part = None if folder is None else folder / f"self-{index}.jsonl"
        if part is None or not part.exists():
            first = writer.first_tokens(generator)[index * BATCH :][:BATCH]
            ids = writer.batch(generator, index, first)
            if part is not None:
                _write(ids, part)
        else:
            ids = _read(part)
        parts.append(ids)
    ids = torch.cat(parts)
    if whole is not None and folder is not None:
        _write(ids, whole)
        for part in folder.glob("self-*.jsonl"):
            part.unlink()
    return ids


def _write(ids: Tensor, file: Path) -> None:
    """JSON lines that a text source may be; whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_suffix(".new")
    staged.write_text("".join(json.dumps({"domain": "self", "ids": row}) + "\n" for row in ids.tolist()))
    staged.rename(file)


def _read(file: Path) -> Tensor:
    return torch.tensor([json.loads(line)["ids"] for line in file.read_text().splitlines()])
