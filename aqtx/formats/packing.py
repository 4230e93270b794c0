"""Bit positions of packed codes, on disk and in memory. Both are lossless and convert into each other.

On disk (row-major, low bits first): element i of a row of b-bit codes occupies bits
[i*b, (i+1)*b) of the row read as one little-endian bit string; a row ends on a byte boundary. For 4 bits
this is OCP's and torchao's order: byte = element 2j | element 2j+1 << 4.

In memory (split planes): a code is cut into planes whose widths are powers of two, low bits first
(3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2; others are one plane). A row is its planes one after the other. A plane of p
bits is a sequence of 16-byte slabs; byte j of a slab holds elements j, j+16, j+32, ... of the slab's
128/p elements, the earliest in the lowest bits. So 16 neighbouring bytes decode to 16 neighbouring
elements with one shift and one mask, which is what vector units (and Inductor's vectoriser) do well;
interleaved neighbours would need a shuffle per load. Rows are padded with zero codes to whole slabs.

Inductor turns an index such as `column // 32` into two loops without asking whether 32 divides the columns, and
leaves the rest of a row unwritten. So whatever is computed by slabs or blocks is computed in whole ones and
`stored` before a row is cut to its columns.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 16
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def stored(values: Tensor) -> Tensor:
    """The same values, which Inductor writes to memory before anything reads them: a strided view needs storage."""
    return values.as_strided(values.shape, values.stride())


def padded_columns(num_columns: int, bits: int) -> int:
    """Columns of a row in memory: whole slabs of its narrowest plane."""
    span = LANES * 8 // min(PLANES[bits])
    return -(-num_columns // span) * span


def memory_bytes(num_columns: int, bits: int) -> int:
    """Bytes of one row's codes in memory."""
    return padded_columns(num_columns, bits) * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K] -> split planes [..., bytes]."""
    missing = padded_columns(codes.shape[-1], bits) - codes.shape[-1]
    codes = pad(codes, (0, missing)) if missing else codes
    planes, shift = [], 0
    for width in PLANES[bits]:
        part = codes if width == bits else (codes >> shift) & ((1 << width) - 1)
        planes.append(_pack_plane(part, width))
        shift += width
    return torch.cat(planes, -1) if len(planes) > 1 else planes[0].contiguous()


def _pack_plane(codes: Tensor, width: int) -> Tensor:
    per_byte = 8 // width
    if per_byte == 1:
        return codes
    slabs = codes.unflatten(-1, (-1, per_byte, LANES))
    packed = slabs[..., 0, :].clone()
    for index in range(1, per_byte):
        packed |= slabs[..., index, :] << (width * index)
    return packed.flatten(-2)


def unpack(planes: Tensor, bits: int, num_columns: int) -> Tensor:
    """Split planes [..., bytes] -> uint8 codes [..., K]."""
    padded = padded_columns(num_columns, bits)
    codes: Tensor | None = None
    start = shift = 0
    for width in PLANES[bits]:
        size = padded * width // 8
        part = _unpack_plane(planes[..., start : start + size], width)
        codes = part if codes is None else codes | (part << shift)
        start, shift = start + size, shift + width
    assert codes is not None
    if padded == num_columns:
        return codes
    return (codes if bits == 8 else stored(codes))[..., :num_columns]


def _unpack_plane(plane: Tensor, width: int) -> Tensor:
    per_byte = 8 // width
    if per_byte == 1:
        return plane
    slabs = plane.unflatten(-1, (-1, LANES))
    mask = (1 << width) - 1
    parts = [(slabs >> (width * index)) & mask for index in range(per_byte)]
    return torch.stack(parts, -2).flatten(-3)


def to_disk_order(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K] -> row-major bytes, low bits first, [..., ceil(K * bits / 8)]."""
    if bits == 8:
        return codes.contiguous()
    num_columns = codes.shape[-1]
    count, size, kind = _group(bits)
    groups = pad(codes, (0, -num_columns % count)).unflatten(-1, (-1, count)).to(kind)
    word = groups[..., 0].clone()
    for index in range(1, count):
        word |= groups[..., index] << (bits * index)
    out = word if size == 1 else torch.stack([(word >> (8 * byte)) & 255 for byte in range(size)], -1).flatten(-2)
    return stored(out)[..., : -(-num_columns * bits // 8)].to(torch.uint8).contiguous()


def from_disk_order(packed: Tensor, bits: int, num_columns: int) -> Tensor:
    """The inverse of `to_disk_order`."""
    if bits == 8:
        return packed
    count, size, kind = _group(bits)
    groups = pad(packed, (0, -packed.shape[-1] % size)).unflatten(-1, (-1, size)).to(kind)
    word = groups[..., 0].clone()
    for index in range(1, size):
        word |= groups[..., index] << (8 * index)
    mask = (1 << bits) - 1
    codes = torch.stack([((word >> (bits * index)) & mask).to(torch.uint8) for index in range(count)], -1)
    return stored(codes.flatten(-2))[..., :num_columns]


def _group(bits: int) -> tuple[int, int, torch.dtype]:
    """The fewest codes that are whole bytes, those bytes, and a dtype that holds them."""
    count = 8 // math.gcd(bits, 8)
    size = count * bits // 8
    return count, size, torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64
