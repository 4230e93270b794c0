"""Codes of this project as the blocks of GGUF's types, bit for bit where a type holds them.

A block is its scale in half precision, then its codes. Nibbles come in halves: byte j of a block of B holds element j
in its low and element j + B/2 in its high half. Layouts: ggml's `ggml-common.h` (block_q4_0 and the others).

| codes | type | values |
|---|---|---|
| INT2 to INT4 symmetric | Q4_0 | d (q - 8) |
| INT5 symmetric | Q5_0 | d (q - 16), high bits in a word before the nibbles |
| INT6 whole rows | Q6_K | d s (q - 32) in super-blocks of 256, s = 1 |
| INT6, INT8 symmetric | Q8_0 | d q |
| FP4, FP6 E2M3, MXFP6 E2M3 | Q8_0 | values times 2 or 8 are small integers |
| INT2 to INT5 asymmetric | Q4_1, Q5_1 | d q + m, m = -s z rounded to half precision |
| Q2_K to Q6_K | Q2_K to Q6_K | gguf_k_types.py |
| MXFP4, NVFP4 | MXFP4, NVFP4 | E8M0 or E4M3 scales; NVFP4's outer scale is a tensor of its own |
"""

from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from torch import Tensor

from aqtx.checkpoint.exports.gguf_k_types import parts_of
from aqtx.formats import QuantizedTensor
from aqtx.formats.elements import code_to_value
from aqtx.formats.scales import decode_scale
from aqtx.formats.table import E8M0, NVFP4_SCALE, SUPER_BLOCK, Format

Bytes = NDArray[np.uint8]
Array = NDArray[Any]
_INTEGER_STEPS = {"e2m1": 2, "e2m3": 8}  # values times this are integers
_HALF_LARGEST = float(np.finfo(np.float16).max)


class Encoded(NamedTuple):
    """A matrix as rows of blocks [N, bytes]; `outer` is NVFP4's scale; `rounded` counts inexact scales and minima."""

    rows: Bytes
    kind: Kind
    outer: float | None
    rounded: int


def kind_of(fmt: Format, num_columns: int) -> Kind | None:
    """The type that keeps a format's codes on rows of so many weights, None where there is none."""
    size, element = fmt.block_size(num_columns), fmt.element
    if fmt.scale.code_bits:
        return Kind[fmt.name.upper()] if num_columns % SUPER_BLOCK == 0 else None
    if fmt.scale is E8M0 and element.name == "e2m1":
        return Kind.MXFP4 if num_columns % 32 == 0 else None
    if fmt.scale is NVFP4_SCALE:
        return Kind.NVFP4 if num_columns % 64 == 0 else None
    if num_columns % 32 or size % 32 or num_columns % size:
        return None
    if element.is_float:
        return Kind.Q8_0 if element.name in _INTEGER_STEPS else None
    if fmt.asymmetric:
        return Kind.Q4_1 if element.bits <= 4 else Kind.Q5_1 if element.bits == 5 else None
    if element.bits == 6 and size % 256 == 0:
        return Kind.Q6_K
    return Kind.Q4_0 if element.bits <= 4 else Kind.Q5_0 if element.bits == 5 else Kind.Q8_0


def encode(value: QuantizedTensor) -> Encoded:
    """The rows of blocks of one matrix [N, K] whose format has a type."""
    fmt, columns = value.format, value.num_columns
    kind = kind_of(fmt, columns)
    assert kind is not None and value.scale is not None  # refused before
    if fmt.scale.code_bits:
        return Encoded(_rows(*parts_of(value)), kind, None, 0)
    codes = value.codes().numpy()
    if kind is Kind.MXFP4:
        stored = value.scale.numpy()[..., None]
        return Encoded(_rows(stored, _nibbles(_blocks(codes, 32))), kind, None, 0)
    if kind is Kind.NVFP4:
        return _nvfp4(value, codes)
    scale = _spread(decode_scale(value.scales, fmt), 256 if kind is Kind.Q6_K else 32, columns)
    if kind in (Kind.Q4_1, Kind.Q5_1):
        return _with_minimum(value, codes, scale, kind)
    if fmt.element.is_float:
        steps = _INTEGER_STEPS[fmt.element.name]
        integers = (code_to_value(value.codes(), fmt.element) * steps).numpy().astype(np.int8)
        half, rounded = _half(scale / steps)
        return Encoded(_rows(half, _blocks(integers, 32).view(np.uint8)), kind, None, rounded)
    half, rounded = _half(scale)
    middle = 2 ** (fmt.element.bits - 1)
    if kind is Kind.Q6_K:
        return Encoded(_rows(*_six_bits(codes), half), kind, None, rounded)
    if kind is Kind.Q8_0:
        signed = (codes.astype(np.int16) - middle).astype(np.int8).view(np.uint8)
        return Encoded(_rows(half, _blocks(signed, 32)), kind, None, rounded)
    if kind is Kind.Q5_0:
        blocks = _blocks(codes, 32)
        return Encoded(_rows(half, _high_bits(blocks), _nibbles(blocks & 15)), kind, None, rounded)
    return Encoded(_rows(half, _nibbles(_blocks(codes - middle + 8, 32))), kind, None, rounded)


def _with_minimum(value: QuantizedTensor, codes: Bytes, scale: Array, kind: Kind) -> Encoded:
    """d q + m: the zero point becomes a minimum, which half precision may not hold exactly."""
    assert value.zero_point is not None
    minimum = -scale * _spread(value.zero_point.float(), 32, value.num_columns)
    (half, bad_scales), (lowest, bad_minima) = _half(scale), _half(minimum)
    blocks = _blocks(codes, 32)
    parts = [half, lowest] + ([_high_bits(blocks)] if kind is Kind.Q5_1 else []) + [_nibbles(blocks & 15)]
    return Encoded(_rows(*parts), kind, None, bad_scales + bad_minima)


def _nvfp4(value: QuantizedTensor, codes: Bytes) -> Encoded:
    """Four scales, then four blocks of 16, in every 64 weights."""
    assert value.scale is not None and value.per_tensor_scale is not None
    rows = len(codes)
    scales = (value.scale.numpy() & 0x7F).reshape(rows, -1, 4)
    nibbles = _nibbles(_blocks(codes, 16)).reshape(rows, -1, 32)
    return Encoded(_rows(scales, nibbles), Kind.NVFP4, float(value.per_tensor_scale), 0)


def _six_bits(codes: Bytes) -> tuple[Bytes, Bytes, Bytes]:
    """Q6_K: low nibbles and high pairs, each in two halves of 128 weights, and 16 sub-scales of 1."""
    quarters = codes.reshape(len(codes), -1, 2, 4, 32)
    low = np.concatenate(
        [(quarters[..., i, :] & 15) | ((quarters[..., i + 2, :] & 15) << 4) for i in (0, 1)], axis=-1
    )  # [N, G, 2, 64]
    high = np.zeros((*quarters.shape[:3], 32), np.uint8)
    for i in range(4):
        high |= (quarters[..., i, :] >> 4) << (2 * i)
    ones = np.ones((*quarters.shape[:2], 16), np.uint8)
    return low.reshape(*low.shape[:2], 128), high.reshape(*high.shape[:2], 64), ones


def _blocks(codes: Array, size: int) -> Array:
    return codes.reshape(len(codes), -1, size)


def _nibbles(blocks: Array) -> Bytes:
    half = blocks.shape[-1] // 2
    return (blocks[..., :half] | (blocks[..., half:] << 4)).astype(np.uint8)


def _high_bits(blocks: Array) -> Bytes:
    """Bit 4 of each of 32 codes as a little-endian word: element j in bit j."""
    return np.packbits((blocks >> 4) & 1, axis=-1, bitorder="little")


def _half(values: Array) -> tuple[Bytes, int]:
    """Half-precision bytes [.., 2] and how many values they do not hold exactly."""
    half = values.astype(np.float16)
    return half.view(np.uint8).reshape(*values.shape, 2), int((half.astype(np.float32) != values).sum())


def _spread(per_block: Tensor, size: int, num_columns: int) -> Array:
    """[N, G] of this project's blocks as [N, K / size]: larger blocks are said once for each of the type's."""
    values: Array = per_block.numpy()
    return np.repeat(values, num_columns // size // values.shape[1], axis=1)


def _rows(*parts: Array) -> Bytes:
    """The parts of each block one behind the other: [N, G, b] each -> [N, G * bytes]."""
    joined = np.concatenate([part.view(np.uint8) for part in parts], axis=-1)
    return np.ascontiguousarray(joined.reshape(len(joined), -1))


def too_large(value: QuantizedTensor) -> bool:
    """Whether a scale exceeds half precision."""
    fmt = value.format
    if fmt.scale.code_bits or (fmt.scale in (E8M0, NVFP4_SCALE) and fmt.element.name == "e2m1"):
        return False
    return bool(decode_scale(value.scales, value.format).abs().max() > _HALF_LARGEST)
