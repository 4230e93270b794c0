"""A folder whose weights are packed, read as plain weights: under their plain names, decoded when asked for."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aqtx.checkpoint.header import Entry
from aqtx.checkpoint.reader import DTYPES, CheckpointReader, declared_dtype
from aqtx.formats.scales import decode_e8m0
from aqtx.program.names import Shape

Parts = Mapping[str, Tensor]
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
assert set(_NAMES) == set(DTYPES.values())


@dataclass(frozen=True)
class Packed:
    """One packed weight.

    `shape` is [N, K], or [E, N, K] of a stack, whose parts are then stacks as well. `parts` are the keys of what is
    stored, by role; `decode` makes float32 [N, K] of the parts of one matrix. `kind` is how it is told.
    """

    shape: Shape
    parts: Mapping[str, str]
    kind: str
    decode: Callable[[Parts], Tensor]


class PackedReader(CheckpointReader):
    """`CheckpointReader` of weights decoded to the dtype in which the program computes, and of those stored plainly."""

    def __init__(
        self,
        files: CheckpointReader,
        packed: Mapping[str, Packed],
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype | None = None,
        unread: Collection[str] = (),
    ) -> None:
        """`unread` are keys that say nothing about weights, such as scales of inputs; they are told, not read."""
        self.folder, self._files, self._packed = files.folder, files, dict(packed)
        self._dtype = dtype or declared_dtype(config, files.folder)
        used = {*unread, *(key for weight in packed.values() for key in weight.parts.values())}
        self.entries = {key: entry for key, entry in files.entries.items() if key not in used}
        for key, weight in packed.items():
            first = files.entries[next(iter(weight.parts.values()))]
            self.entries[key] = Entry(first.file, _NAMES[self._dtype], weight.shape)
        self._unread = len(unread)

    @property
    def found(self) -> str | None:
        """What is packed, in words: "fp8 e4m3, blocks 128 x 128"."""
        if not self._packed:
            return None
        kinds = "; ".join(sorted({weight.kind for weight in self._packed.values()}))
        return f"{kinds} ({self._unread} scales of inputs left out)" if self._unread else kinds

    def dtype(self) -> torch.dtype:
        """The dtype that weights are decoded to."""
        return self._dtype

    def own_dtype(self, key: str) -> torch.dtype | None:
        """None for what is packed: it takes the program's."""
        return None if key in self._packed else self._files.own_dtype(key)

    def get(self, key: str) -> Tensor:
        """A weight, decoded, or memory-mapped where it is stored plainly."""
        if key not in self._packed:
            return self._files.get(key)
        return self.part(key, tuple(range(size) for size in self._packed[key].shape))

    def part(self, key: str, parts: tuple[range, ...]) -> Tensor:
        """A part of a weight; of a stack only the experts asked for are decoded, one at a time."""
        if key not in self._packed:
            return self._files.part(key, parts)
        inside = tuple(slice(part.start, part.stop, part.step) for part in parts[-2:])
        if len(parts) == 2:
            return self.decode(key).to(self._dtype)[inside]
        return torch.stack([self.decode(key, expert)[inside].to(self._dtype) for expert in parts[0]])

    def decode(self, key: str, expert: int | None = None) -> Tensor:
        """The float32 values [N, K] of a packed matrix, or of one expert of a packed stack."""
        weight = self._packed[key]
        parts = {role: self._files.get(place) for role, place in weight.parts.items()}
        return weight.decode(parts if expert is None else {role: value[expert] for role, value in parts.items()})


def real_scale(scale: Tensor) -> Tensor:
    """Scales as float32, where bytes are powers of two (E8M0)."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return decode_e8m0(scale.view(torch.uint8))
    return scale.float()


def block_sizes(scale: Shape, shape: Shape, blocks: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Rows and columns under one scale of a matrix [N, K], None where the scales' shape does not fit.

    A dimension has one scale, one for each row or column, or one for each block; the last block may be ragged where
    its size is told.
    """
    found = []
    for count, size, block in zip(scale, shape, blocks or (None, None), strict=True):
        if count in (1, size):
            found.append(size if count == 1 else 1)
        elif block is not None and -(-size // block) == count:
            found.append(block)
        elif size % count == 0 and block is None:
            found.append(size // count)
        else:
            return None
    return found[0], found[1]


def spread(scale: Tensor, shape: Shape, sizes: tuple[int, int]) -> Tensor:
    """Scales [n, k] over the rows and columns of a matrix [N, K]; a dimension with one scale stays one."""
    for dim, (size, block) in enumerate(zip(shape, sizes, strict=True)):
        if scale.shape[dim] != 1 and block > 1:
            scale = scale.repeat_interleave(block, dim).narrow(dim, 0, size)
    return scale


def blocks_in_words(sizes: tuple[int, int], shape: Shape) -> str:
    """How far a scale reaches: "blocks 128 x 128", "a scale per row"."""
    if sizes == shape:
        return "a scale per matrix"
    if sizes[0] == 1:
        return "a scale per row" if sizes[1] == shape[1] else f"groups of {sizes[1]}"
    return f"blocks {sizes[0]} x {sizes[1]}"
