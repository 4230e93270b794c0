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
from typing import Any

import torch
from torch import Tensor

from aqtx.program.generate import Generator, Sampling, Writes
from aqtx.program.program import Program
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.expert_choices import vocabulary_of
from aqtx.text.tokens import check_room

FILE_NAME = "self.jsonl"
BATCH = 64  # sequences written side by side
PROBES = 1024  # first tokens whose continuations tell the frequencies
Progress = Callable[..., Iterable[Any]]


@dataclass(frozen=True)
class Writer:
    """Writes one calibration text: the same seed gives the same text, whether it was interrupted or not.

    Args:
        program: the model; one without a cache writes too, at the cost of a pass over the whole text per token.
        spec: how many sequences, how long, at which temperature, from which first tokens.
        seed: of everything random.
        start: what the model's tokenizer puts before every text (`aqtx.text.tokens.start_of`).
        make: makes what writes, when it is needed; None holds the whole model in memory.
    """

    program: Program
    spec: CalibrationSpec
    seed: int = 0
    start: Sequence[int] = ()
    make: Callable[[], Writes] | None = None

    def text(self, folder: Path | None, progress: Progress | None = None) -> Tensor:
        """Calibration ids [num_sequences, sequence_length].

        Args:
            folder: batches are kept here, and the whole as `self.jsonl`, which later runs read as a text source.
            progress: wraps the batches.
        """
        check_room(self.spec, [*self.start, 0])
        if folder is None:
            return self._written(None, progress)
        whole = folder / FILE_NAME
        if not whole.exists():
            _write(self._written(folder, progress), whole)
            for part in folder.glob("self-*.jsonl"):
                part.unlink()
        return _read(whole)

    def first_tokens(self, writes: Writes) -> Tensor:
        """The first token of each sequence [num_sequences], behind `start`."""
        random = torch.Generator().manual_seed(self.seed)
        vocabulary = vocabulary_of(self.program, "score")
        rounds = -(-self.spec.num_sequences // vocabulary)
        uniform = torch.cat([torch.randperm(vocabulary, generator=random) for _ in range(rounds)])
        if self.spec.starts == "uniform":
            return uniform[: self.spec.num_sequences]
        probes = torch.randperm(vocabulary, generator=random)[:PROBES]
        shares = writes.mean_next(self._behind_start(probes))
        return shares.multinomial(self.spec.num_sequences, replacement=True, generator=random)

    def _written(self, folder: Path | None, progress: Progress | None) -> Tensor:
        """All batches, those that are missing in the folder written now."""
        batches = range(-(-self.spec.num_sequences // BATCH))
        files = {index: None if folder is None else folder / f"self-{index}.jsonl" for index in batches}
        parts = {index: _read(file) for index, file in files.items() if file is not None and file.exists()}
        missing = [index for index in files if index not in parts]
        if missing:
            writes = Generator(self.program) if self.make is None else self.make()
            first, size = self.first_tokens(writes), min(writes.at_once, len(missing))
            groups = [missing[start : start + size] for start in range(0, len(missing), size)]
            for group in progress(groups, description="own text") if progress is not None else groups:
                for index, ids in zip(group, self._batches(writes, first, group), strict=True):
                    parts[index], file = ids, files[index]
                    if file is not None:
                        _write(ids, file)
        return torch.cat([parts[index] for index in sorted(parts)])

    def _batches(self, writes: Writes, first: Tensor, group: Sequence[int]) -> list[Tensor]:
        """Sequences [B, length] of some batches; they depend on the seed and the batch's index alone."""
        firsts = [self._behind_start(first[index * BATCH :][:BATCH]) for index in group]
        randoms = [torch.Generator().manual_seed(self.seed * 1_000_003 + index) for index in group]
        sampling = Sampling(temperature=self.spec.temperature)
        return writes.write_each(firsts, self.spec.sequence_length, sampling, randoms)

    def _behind_start(self, tokens: Tensor) -> Tensor:
        start = torch.tensor(self.start, dtype=torch.long).expand(len(tokens), -1)
        return torch.cat([start, tokens.unsqueeze(-1)], dim=1)


def _write(ids: Tensor, file: Path) -> None:
    """JSON lines that a text source may be; whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_suffix(".new")
    staged.write_text("".join(json.dumps({"domain": "self", "ids": row}) + "\n" for row in ids.tolist()))
    staged.rename(file)


def _read(file: Path) -> Tensor:
    return torch.tensor([json.loads(line)["ids"] for line in file.read_text().splitlines()])
