"""A model under a plan, without codes: its weights replaced by the values that round-to-nearest would give.

For trying many plans on one text: what a plan shares with the one before is not rounded again while the model fits into
memory, and nothing of the program changes. A model that does not fit runs one block at a time.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from aqtx.blockwise.block_runner import Runner
from aqtx.blockwise.block_scores import BlockScorer, many_with
from aqtx.formats import fake_quantize, parse
from aqtx.program.blocks import Block, Values
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.sensitivity.selection import unique_sites

CACHE_BYTES = 1 << 30

_Changes = tuple[tuple[str, str], ...]  # of one weight: site and format


@dataclass
class RoundedModel:
    """Runs a program under plans, one after the other.

    Args:
        program: without codes; not changed.
        room: bytes that may be taken.
        work: folder for what waits between blocks, None for a temporary one.
    """

    program: Program
    room: int = sys.maxsize
    work: Path | None = None
    _sites: dict[str, Site] = field(init=False)
    _held: dict[str, tuple[_Changes, Tensor]] = field(default_factory=dict)  # a model that fits, as it was used last
    _cache: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _cached_bytes: int = 0

    def __post_init__(self) -> None:
        """Sites by name."""
        self._sites = unique_sites(self.program)

    def use(self, formats: Mapping[str, str | None]) -> BlockScorer:
        """Token ids -> logits under a plan, site name -> format; None and bf16 leave a site as it is."""
        changes: dict[str, list[tuple[str, str]]] = {}
        for name, fmt in formats.items():
            if fmt not in (None, "bf16"):
                changes.setdefault(self._sites[name].weight, []).append((name, str(fmt)))
        scorer = _RoundedScorer(self.program, self.room, self.work)
        scorer.model, scorer.changes = self, {weight: tuple(found) for weight, found in changes.items()}
        return scorer

    def value(self, weight: str, changes: _Changes, *, hold: bool) -> Tensor:
        """A parameter with some of its matrices rounded; `hold` keeps it for the next plan."""
        if weight in self._held and self._held[weight][0] == changes:
            return self._held[weight][1]
        spec = self.program.weights.specs[weight]
        value = self.program.weights.get(weight).detach().to(self.program.device, spec.dtype, copy=True)
        for name, fmt in changes:
            site = self._sites[name]
            value[() if site.expert is None else site.expert] = self._matrix(site, fmt, hold=hold)
        if hold:
            self._held[weight] = (changes, value)
        return value

    def _matrix(self, site: Site, fmt: str, *, hold: bool) -> Tensor:
        key = (site.name, fmt)
        if key not in self._cache:
            value = fake_quantize(self.program.read(site).to(self.program.device), parse(fmt)).to(self.program.dtype)
            if not hold or self._cached_bytes + value.nbytes > CACHE_BYTES:
                return value
            self._cache[key] = value
            self._cached_bytes += value.nbytes
        return self._cache[key]


class _RoundedScorer(BlockScorer):
    """Scores with one plan's values."""

    model: RoundedModel
    changes: Mapping[str, _Changes]

    def load(self, runner: Runner, block: Block) -> Values:
        """The block's parameters, rounded as they are read."""
        values = {}
        for node in block.parameters:
            name = str(node.target)
            if name in self.program.buffers:
                values[node] = self.program.buffers[name].to(self.program.device)
            else:
                values[node] = self.model.value(name, self.changes.get(name, ()), hold=not self.streams)
        return values


@torch.no_grad()
def mean_loss(forward: Callable[[Tensor], Tensor], ids: Tensor, *, batch_size: int = 8) -> float:
    """Nats per token of next-token prediction over sequences [n, length]."""
    total, batches = 0.0, ids.split(batch_size)
    for batch, scores in zip(batches, many_with(forward)(batches), strict=True):
        logits = scores[:, :-1].float().flatten(0, 1)
        targets = batch[:, 1:].flatten().to(logits.device)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total / (ids.shape[0] * (ids.shape[1] - 1))
