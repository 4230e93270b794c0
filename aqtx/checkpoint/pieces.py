"""Tensors that are put together from stored ones when they are read, and only what is asked for is read.

A piece knows its shape. Slicing, transposing and chunking make new pieces: index arithmetic that ends at the stored
tensors, so that one expert of a stack, or the gate of a fused projection, costs one expert or one gate.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from aqtx.program.names import Shape

Read = Callable[[str, tuple[range, ...]], Tensor]  # key, what of each dimension -> values


class Piece(ABC):
    """A tensor of a known shape that is read on demand. Ranges run upward."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Its shape."""

    @abstractmethod
    def take(self, dim: int, part: range) -> "Piece":
        """A part of one dimension, which stays a dimension."""

    @abstractmethod
    def leaves(self) -> set[str]:
        """The stored tensors that it is made of."""

    @abstractmethod
    def read(self) -> Tensor:
        """Its values; may be memory-mapped, never to be written to."""

    def __getitem__(self, slices: tuple[slice, ...]) -> "Piece":
        """As a tensor is sliced, by steps upward."""
        made: Piece = self
        for dim, part in enumerate(slices):
            made = made.take(dim, range(self.shape[dim])[part])
        return made

    def transpose(self, first: int, second: int) -> "Piece":
        """Two dimensions exchanged."""
        return Transposed(self, first, second)

    def chunk(self, count: int, dim: int) -> tuple["Piece", ...]:
        """Equal parts along a dimension, as `torch.chunk` cuts it."""
        size = -(-self.shape[dim] // count)
        return self.split([min(size, self.shape[dim] - at) for at in range(0, self.shape[dim], size)], dim)

    def split(self, sizes: Sequence[int], dim: int) -> tuple["Piece", ...]:
        """Parts of given sizes along a dimension."""
        return tuple(self.take(dim, range(end - size, end)) for size, end in zip(sizes, accumulate(sizes), strict=True))

    def select(self, dim: int, index: int) -> "Piece":
        """One index of a dimension, which goes."""
        return Squeezed(self.take(dim, range(index, index + 1)), dim)


@dataclass(frozen=True)
class Stored(Piece):
    """A tensor of the checkpoint, or a part of it."""

    fetch: Read
    key: str
    parts: tuple[range, ...]

    @property
    def shape(self) -> Shape:
        """The length of each part."""
        return tuple(len(part) for part in self.parts)

    def take(self, dim: int, part: range) -> Self:
        """A part of what is taken already."""
        return replace(self, parts=(*self.parts[:dim], self.parts[dim][_slice(part)], *self.parts[dim + 1 :]))

    def leaves(self) -> set[str]:
        """One."""
        return {self.key}

    def read(self) -> Tensor:
        """From the file."""
        return self.fetch(self.key, self.parts)


def stored(fetch: Read, key: str, shape: Shape) -> Stored:
    """The whole of a tensor of the checkpoint."""
    return Stored(fetch, key, tuple(range(size) for size in shape))


@dataclass(frozen=True)
class Joined(Piece):
    """Pieces one behind the other along a dimension."""

    members: tuple[Piece, ...]
    dim: int

    def __post_init__(self) -> None:
        """ValueError where shapes do not go together."""
        _refuse_unlike([_without(member.shape, self.dim) for member in self.members])

    @property
    def shape(self) -> Shape:
        """Lengths along the dimension add up."""
        first = self.members[0].shape
        return (*first[: self.dim], sum(member.shape[self.dim] for member in self.members), *first[self.dim + 1 :])

    def take(self, dim: int, part: range) -> Piece:
        """Along the dimension, of those members that it touches."""
        if dim != self.dim:
            return replace(self, members=tuple(member.take(dim, part) for member in self.members))
        found, start = [], 0
        for member in self.members:
            inside = part[bisect_left(part, start) : bisect_left(part, start + member.shape[dim])]
            if inside:
                found.append(member.take(dim, range(inside.start - start, inside.stop - start, inside.step)))
            start += member.shape[dim]
        return found[0] if len(found) == 1 else replace(self, members=tuple(found))

    def leaves(self) -> set[str]:
        """All members'."""
        return set[str]().union(*(member.leaves() for member in self.members))

    def read(self) -> Tensor:
        """A copy."""
        return torch.cat([member.read() for member in self.members], self.dim)


@dataclass(frozen=True)
class Stacked(Piece):
    """Pieces of one shape along a new dimension."""

    members: tuple[Piece, ...]
    dim: int

    def __post_init__(self) -> None:
        """ValueError where shapes differ."""
        _refuse_unlike([member.shape for member in self.members])

    @property
    def shape(self) -> Shape:
        """With the new dimension."""
        first = self.members[0].shape
        return (*first[: self.dim], len(self.members), *first[self.dim :])

    def take(self, dim: int, part: range) -> Piece:
        """Some of the members, or a part of each."""
        if dim == self.dim:
            return replace(self, members=self.members[_slice(part)])
        inner = dim if dim < self.dim else dim - 1
        return replace(self, members=tuple(member.take(inner, part) for member in self.members))

    def leaves(self) -> set[str]:
        """All members'."""
        return set[str]().union(*(member.leaves() for member in self.members))

    def read(self) -> Tensor:
        """A copy, or the only member itself."""
        if len(self.members) == 1:
            return self.members[0].read().unsqueeze(self.dim)
        return torch.stack([member.read() for member in self.members], self.dim)


@dataclass(frozen=True)
class Transposed(Piece):
    """Two dimensions exchanged."""

    member: Piece
    first: int
    second: int

    def _inner(self, dim: int) -> int:
        return {self.first: self.second, self.second: self.first}.get(dim, dim)

    @property
    def shape(self) -> Shape:
        """The member's, exchanged."""
        return tuple(self.member.shape[self._inner(dim)] for dim in range(len(self.member.shape)))

    def take(self, dim: int, part: range) -> Piece:
        """Of the other dimension."""
        return replace(self, member=self.member.take(self._inner(dim), part))

    def leaves(self) -> set[str]:
        """The member's."""
        return self.member.leaves()

    def read(self) -> Tensor:
        """A view."""
        return self.member.read().transpose(self.first, self.second)


@dataclass(frozen=True)
class Squeezed(Piece):
    """Without a dimension of one."""

    member: Piece
    dim: int

    @property
    def shape(self) -> Shape:
        """The member's, without it."""
        return _without(self.member.shape, self.dim)

    def take(self, dim: int, part: range) -> Piece:
        """Of what stays."""
        return replace(self, member=self.member.take(dim if dim < self.dim else dim + 1, part))

    def leaves(self) -> set[str]:
        """The member's."""
        return self.member.leaves()

    def read(self) -> Tensor:
        """A view."""
        return self.member.read().squeeze(self.dim)


def _slice(part: range) -> slice:
    return slice(part.start, part.stop, part.step)


def _without(shape: Shape, dim: int) -> Shape:
    return (*shape[:dim], *shape[dim + 1 :])


def _refuse_unlike(shapes: list[Shape]) -> None:
    """ValueError unless there are shapes, and one only."""
    if len(set(shapes)) != 1:
        raise ValueError(f"tensors of {len(set(shapes))} shapes cannot be one: {sorted(set(shapes))}")
