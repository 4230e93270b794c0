"""Proof that training touched nothing else: a hash of every other tensor, before and after."""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.program.program import Program


@dataclass(frozen=True)
class Frozen:
    """SHA-256 of each tensor that must not change: parameters and codes by name."""

    digests: dict[str, str]
    excepted: frozenset[str]

    @classmethod
    def of(cls, program: Program, *, except_for: Collection[str]) -> "Frozen":
        """The state of a program now."""
        excepted = frozenset(except_for)
        return cls(dict(_digests(program, excepted)), excepted)

    def check(self, program: Program) -> None:
        """Raise if a tensor differs from what it was; this is a fault of the program, not of its input."""
        now = dict(_digests(program, self.excepted))
        changed = [name for name in self.digests.keys() | now.keys() if self.digests.get(name) != now.get(name)]
        if changed:
            raise RuntimeError(f"training changed {len(changed)} other tensors, first {min(changed)}")


def _digests(program: Program, excepted: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Of one matrix at a time; experts of a stack each have their own."""
    sites = program.sites_by_weight()
    for name in program.weights.names():
        stacked = [site for site in sites.get(name, []) if site.expert is not None]
        for site in stacked if name not in excepted else []:
            yield site.name, _digest(program.weights.matrix(name, site.expert))
        if name not in excepted and not stacked:
            yield name, _digest(program.weights.get(name))
    for site in program.sites():
        if site.name in program.codes:
            for part, tensor in program.codes[site.name].to_disk().items():
                yield f"{site.name}.{part}", _digest(tensor)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()
