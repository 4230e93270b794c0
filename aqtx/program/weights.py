"""Weights by parameter name: read lazily from a checkpoint or a module, replaced by what passes write.

A stacked parameter [E, N, K] may lie on disk as E matrices; one expert is read without the others,
so planning touches one matrix at a time, memory-mapped, whatever the size of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from aqtx.formats import dequantized
from aqtx.program.weight_changes import Change, from_json, make, to_json


@dataclass(frozen=True)
class Spec:
    """Logical shape of a parameter, the dtype that graphs compute with, and that of files where it is wider."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype | None = None

    @property
    def on_disk(self) -> torch.dtype:
        """The dtype in files."""
        return self.stored or self.dtype

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

    def own_dtype(self, name: str) -> torch.dtype | None:
        """The floating-point dtype that a parameter has here, None where it has none, or one that means nothing."""


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

    def own_dtype(self, name: str) -> torch.dtype | None:
        """The tensor's."""
        dtype = self.tensors[name].dtype
        return dtype if dtype.is_floating_point else None


class WeightStore:
    """All parameters of a program by name; what was put or changed replaces what the source holds.

    What passes put may be more precise than the parameter's declared dtype, and changes are made
    in float64 on reading: `precise` tells it all, `get` and `matrix` round it once.

    Graphs read a tied head as a parameter of its own, `tied` names the one that holds its value. It
    is stored once until a pass writes, changes or rounds either of the two.
    """

    def __init__(self, specs: dict[str, Spec], source: Source, *, tied: Mapping[str, str] | None = None) -> None:
        self.specs = dict(specs)
        self.tied = dict(tied or {})
        self.formats: Mapping[str, str] = {}  # of matrices that the source holds packed, by site
        self._source = source
        self._written: dict[str, Tensor] = {}
        self._changes: dict[str, list[Change]] = {}

    def names(self) -> list[str]:
        """Parameter names in the order of the model."""
        return list(self.specs)

    def shared(self) -> dict[str, str]:
        """Tied parameters that still have the value of the one they are tied to."""
        touched = self._written.keys() | self._changes.keys()
        return {name: to for name, to in self.tied.items() if not {name, to} & touched}

    def written(self) -> dict[str, Tensor]:
        """The parameters that passes have replaced."""
        return dict(self._written)

    def get(self, name: str) -> Tensor:
        """The whole parameter in its declared dtype; may be memory-mapped, never to be written to."""
        return self._declared(name, None, self.specs[name].dtype)

    def matrix(self, name: str, expert: int | None = None) -> Tensor:
        """One matrix [N, K] in the declared dtype: the parameter, or one expert's slice of a stacked one."""
        return self._declared(name, expert, self.specs[name].dtype)

    def on_disk(self, name: str, expert: int | None = None) -> Tensor:
        """A parameter or an expert's matrix in the dtype that files hold it in."""
        return self._declared(name, expert, self.specs[name].on_disk)

    def precise(self, name: str, expert: int | None = None, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter or an expert's matrix, dequantized, with all changes made in float64, in `dtype`; a copy."""
        value, changes = dequantized(self._raw(name, expert)), self._changes.get(name, [])
        if changes and value.dim() == 3:
            return torch.stack([make(changes, matrix).to(dtype) for matrix in value])
        return make(changes, value).to(dtype) if changes else value.to(dtype, copy=True)

    def own_dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a parameter in the source; None of a tied one, which has none of its own."""
        return None if name in self.tied else self._source.own_dtype(name)

    def packed_as(self, name: str, site: str) -> str | None:
        """The format that a parameter's site lies packed in at the source, None where a pass has replaced it."""
        return None if name in self._written or name in self._changes else self.formats.get(site)

    def is_mapped(self, name: str) -> bool:
        """Whether `get` gives what lies at the source, not a copy: stacks are put together, other dtypes converted."""
        spec, place = self.specs[name], self.tied.get(name, name)
        touched = {name, place} & (self._written.keys() | self._changes.keys())
        return not touched and len(spec.shape) < 3 and self._source.own_dtype(place) is spec.dtype

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace a parameter, changes included; its logical shape must stay."""
        if tuple(tensor.shape) != self.specs[name].shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} put where {self.specs[name].shape} stands")
        self._changes.pop(name, None)
        self._written[name] = tensor.detach()

    def change(self, name: str, change: Change) -> None:
        """Change a parameter from now on, whenever it is read."""
        self._changes.setdefault(name, []).append(change)

    def add(self, name: str, tensor: Tensor) -> None:
        """A parameter that the model did not have."""
        if name in self.specs:
            raise ValueError(f"{name} exists already")
        self.specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
        self._written[name] = tensor.detach()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON from which `restore` makes the same weights again."""
        vectors: dict[str, Tensor] = {}
        told = {name: [to_json(change, vectors) for change in changes] for name, changes in self._changes.items()}
        return {f"put:{name}": value for name, value in self._written.items()} | vectors, told

    def restore(self, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        """Put and change what `state` told."""
        for key, value in tensors.items():
            if key.startswith("put:"):
                self.put(key.removeprefix("put:"), value)
        for name, changes in told.items():
            self._changes[name] = [from_json(change, tensors) for change in changes]

    def _raw(self, name: str, expert: int | None) -> Tensor:
        """What was put or what the source holds, before changes."""
        if name in self._written:
            whole = self._written[name]
            return whole if expert is None else whole[expert]
        name = self.tied.get(name, name)
        return self._source.parameter(name) if expert is None else self._source.expert(name, expert)

    def _declared(self, name: str, expert: int | None, dtype: torch.dtype) -> Tensor:
        return self.precise(name, expert, dtype=dtype) if name in self._changes else self._raw(name, expert).to(dtype)
