"""Expert-balanced self-sampling (MoEQuant, arXiv 2505.03804): the model writes its own calibration text.

Legend: G sequences grown side by side, W beams each, C = W * W candidates of one, L mixture layers, E experts.
At each step every beam proposes W next tokens, drawn from its own distribution; the model reads all candidates, and
the W of least

    score = -sum(log P) / length + sigma / tau

go on, where sigma is the standard deviation of the experts' normalised usage, averaged over layers, the
candidate and everything written so far included. Each sequence starts from a token of its own, behind what the
tokenizer puts before every text.

The published tau of 1.2 leaves sigma, some hundredths, next to no weight beside some nats of -log(P); a smaller one
buys balance (benchmarks/calibration.py).
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aqtx.program.program import Program
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.expert_choices import Routed, Routes
from aqtx.text.tokens import check_room

BEAMS = 4
TAU = 1.2
PARALLEL = 8
SLOTS = 32  # the cache grows by so many places, since attention reads it whole
FILE_NAME = "ebss.jsonl"


@dataclass(frozen=True)
class Sampled:
    """Token ids [n, length] and how evenly they use the experts: mean over layers of the usage's deviation."""

    ids: Tensor
    usage: Tensor  # [L, E] tokens

    @property
    def deviation(self) -> float:
        """sigma of all that was written."""
        return float(deviation(self.usage))

    def write(self, file: Path) -> None:
        """JSON lines that `calibration: {source: FILE}` reads; the first line tells the balance."""
        share = self.usage / self.usage.sum(-1, keepdim=True)
        balance = {"deviation": self.deviation, "largest": float(share.max()), "smallest": float(share.min())}
        rows: list[dict[str, Any]] = [{"domain": "ebss", "ids": row} for row in self.ids.tolist()]
        rows[0]["balance"] = balance
        staged = file.with_suffix(".new")
        staged.write_text("".join(json.dumps(row) + "\n" for row in rows))
        staged.rename(file)


def deviation(usage: Tensor) -> Tensor:
    """Standard deviation of normalised usage [..., L, E], averaged over layers: [...]."""
    return (usage / usage.sum(-1, keepdim=True).clamp_min(1)).std(-1, unbiased=False).mean(-1)


@dataclass
class _Beams:
    """State of G groups of W beams, in rows g * W + w."""

    ids: Tensor  # [G, W, length]
    nll: Tensor  # [G, W]
    usage: Tensor  # [G, W, L, E]
    logits: Tensor  # [G, W, V] of the next token
    cache: list[Tensor]


class Sampler:
    """Grows groups of sequences through the `step` entry."""

    def __init__(self, routed: Routes, seed: int, tau: float = TAU, start: Sequence[int] = ()) -> None:
        self._routed = routed
        self._random = torch.Generator().manual_seed(seed)
        self._first = itertools.cycle(torch.randperm(routed.num_tokens, generator=self._random).tolist())
        self._tau, self._start = tau, list(start)

    @torch.no_grad()
    def grow(self, num_groups: int, length: int, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """`num_groups` sequences [G, length] and their usage [L, E]; `before` is the usage of earlier ones."""
        first = [[*self._start, token] for token in itertools.islice(self._first, num_groups)]
        beams = self._open(torch.tensor(first).repeat_interleave(BEAMS, 0).unflatten(0, (-1, BEAMS)))
        before = torch.zeros_like(beams.usage[0, 0]) if before is None else before
        for place in range(beams.ids.shape[-1], length):
            beams = self._step(beams, place, before)
        return beams.ids[:, 0].cpu(), beams.usage[:, 0].sum(0)

    def _open(self, ids: Tensor) -> _Beams:
        """Beams that have read their first tokens [G, W, length]."""
        shape = ids.shape[:2]
        cache = [spec.make(shape.numel(), SLOTS, self._routed.device) for spec in self._routed.caches]
        usage = torch.zeros(())
        for place, tokens in enumerate(ids.flatten(0, 1).split(1, -1)):
            cache = self._with_room(cache, place)
            logits, added = self._read(tokens, place, cache)
            usage = usage + added
        nll = torch.full(shape, torch.inf)
        nll[:, 0] = 0  # all beams are equal still: only the first may propose
        return _Beams(ids, nll, usage.view(*shape, *usage.shape[1:]), logits.view(*shape, -1), cache)

    def _step(self, beams: _Beams, place: int, before: Tensor) -> _Beams:
        """Propose, read all candidates, keep the best."""
        groups = len(beams.ids)
        log_p = beams.logits.log_softmax(-1)  # [G, W, V]
        drawn = log_p.exp().flatten(0, 1).multinomial(BEAMS, generator=self._random)  # without replacement
        tokens = drawn.view(groups, BEAMS, BEAMS)
        nll = (beams.nll.unsqueeze(-1) - log_p.gather(-1, tokens)).flatten(1)  # [G, C]
        parents = torch.arange(groups * BEAMS).repeat_interleave(BEAMS)  # rows that candidates come from
        cache = [part.index_select(0, parents.to(part.device)) for part in self._with_room(beams.cache, place)]
        logits, usage = self._read(tokens.view(-1, 1), place, cache)
        usage = beams.usage.repeat_interleave(BEAMS, 1) + usage.view(groups, -1, *usage.shape[1:])
        best = beams.usage[:, 0]
        others = before + (best.sum(0) - best).unsqueeze(1)  # what other sequences wrote
        score = nll / (place - len(self._start)) + deviation(usage + others) / self._tau
        keep = score.topk(BEAMS, -1, largest=False).indices  # [G, W]
        rows = (keep + torch.arange(groups).unsqueeze(1) * BEAMS * BEAMS).flatten()
        ids = torch.cat([beams.ids.flatten(0, 1)[parents], tokens.view(-1, 1)], 1)

        def kept(x: Tensor) -> Tensor:
            return x[rows].view(groups, BEAMS, *x.shape[1:])

        return _Beams(
            kept(ids), kept(nll.flatten()), kept(usage.flatten(0, 1)), kept(logits),
            [part.index_select(0, rows.to(part.device)) for part in cache],
        )  # fmt: skip

    def _with_room(self, cache: list[Tensor], place: int) -> list[Tensor]:
        """A cache that has a slot `place`."""
        specs = self._routed.caches
        have = next(slots for part, spec in zip(cache, specs, strict=True) if (slots := spec.slots(part)) is not None)
        return cache if place < have else [spec.widen(part, SLOTS) for part, spec in zip(cache, specs, strict=True)]

    def _read(self, ids: Tensor, place: int, cache: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Next-token logits [rows, V] and expert counts [rows, L, E] of one token a row."""
        places = torch.tensor([place], device=self._routed.device)
        start = torch.zeros(len(ids), dtype=torch.long, device=self._routed.device)
        logits, usage = self._routed.read(ids.to(self._routed.device), places, start, *cache)
        return logits[:, -1].float().cpu(), usage.cpu()


def sample(
    routed: Routes,
    *,
    num_sequences: int,
    length: int,
    seed: int = 0,
    tau: float = TAU,
    start: Sequence[int] = (),
) -> Sampled:
    """Sequences of tokens that the model finds likely and that load its experts evenly, each behind `start`."""
    sampler = Sampler(routed, seed, tau, start)
    parts: list[Tensor] = []
    usage: Tensor | None = None
    for done in range(0, num_sequences, PARALLEL):
        ids, added = sampler.grow(min(PARALLEL, num_sequences - done), length, usage)
        usage = added if usage is None else usage + added
        parts.append(ids)
    assert usage is not None
    return Sampled(torch.cat(parts), usage)


@torch.no_grad()
def usage_of(program: Program, ids: Tensor) -> Tensor:
    """Tokens [L, E] that each expert gets from given sequences, to compare with."""
    routed = Routed(program, "score")
    return torch.stack([routed.read(batch)[1].sum(0) for batch in ids.to(program.device).split(8)]).sum(0).cpu()


def calibration(
    spec: CalibrationSpec, seed: int, folder: Path | None, make: Callable[[], Routes], *, start: Sequence[int] = ()
) -> Tensor:
    """Calibration ids [num_sequences, sequence_length], sampled once: kept in a folder for a resumed run.

    `make` opens the model where there is something to sample; `start` is what its tokenizer puts before every text
    (`aqtx.text.tokens.start_of`).

    Raises:
        InputError: the model has no experts or cannot generate.
    """
    check_room(spec, start)
    file = None if folder is None else folder / FILE_NAME
    if file is not None and file.exists():
        return torch.tensor([json.loads(line)["ids"] for line in file.read_text().splitlines()])
    sampled = sample(
        make(),
        num_sequences=spec.num_sequences,
        length=spec.sequence_length,
        seed=seed,
        tau=spec.tau or TAU,
        start=start,
    )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        sampled.write(file)
    return sampled.ids
