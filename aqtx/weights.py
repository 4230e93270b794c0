"""Weights by parameter name: read lazily from a checkpoint or a module, replaced by what passes write.

A stacked parameter [E, N, K] may lie on disk as E matrices; one expert is read without the others,
so planning touches one matrix at a time, memory-mapped, whatever the size of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """Logical shape and dtype of a parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class Source(Protocol):
    """Where weights come from: a checkpoint on disk or a module in memory."""

    def parameter(self, name: str) -> Tensor:
        """The whole parameter."""

    def expert(self, name: str, index: int) -> Tensor:
        """One expert's matrix of a stacked parameter."""


@dataclass
class ModuleSource:
    """Weights of a module in memory."""

    tensors: Mapping[str, Tensor]

    def parameter(self, name: str) -> Tensor:
        """The module's own tensor."""
        return self.tensors[name].detach()

    def expert(self, name: str, index: int) -> Tensor:
        """A view of one expert."""
        return self.tensors[name].detach()[index]


class WeightStore:
    """All parameters of a program by name; what was put replaces what the source holds."""

    def __init__(self, specs: dict[str, Spec], source: Source) -> None:
        self.specs = dict(specs)
        self._source = source
        self._written: dict[str, Tensor] = {}

    def names(self) -> list[str]:
        """Parameter names in the order of the model."""
        return list(self.specs)

    def written(self) -> dict[str, Tensor]:
        """The parameters that passes have replaced."""
        return dict(self._written)

    def get(self, name: str) -> Tensor:
        """The whole parameter in its declared dtype; may be memory-mapped, never to be written to."""
        if name in self._written:
            return self._written[name]
        return self._source.parameter(name).to(self.specs[name].dtype)

    def matrix(self, name: str, expert: int | None = None) -> Tensor:
        """One matrix [N, K]: the parameter, or one expert's slice of a stacked one."""
        if name in self._written or expert is None:
            whole = self.get(name)
            return whole if expert is None else whole[expert]
        return self._source.expert(name, expert)

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace a parameter; its logical shape must stay."""
        if tuple(tensor.shape) != self.specs[name].shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} put where {self.specs[name].shape} stands")
        self._written[name] = tensor.detach()

    def add(self, name: str, tensor: Tensor) -> None:
        """A parameter that the model did not have."""
        if name in self.specs:
            raise ValueError(f"{name} exists already")
        self.specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
        self._written[name] = tensor.detach()
