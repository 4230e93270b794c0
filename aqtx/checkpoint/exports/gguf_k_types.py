"""The K-quants of this project as GGUF's blocks of 256 weights, bit for bit.

Pairs of bits, nibbles and single bits are taken from runs of 32 weights: bit places of one byte belong to weights 32
apart. Six-bit codes of scales are split into low and high parts. Layouts: ggml's `ggml-common.h` (block_q2_K to q6_K).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aqtx.formats import QuantizedTensor
from aqtx.formats.table import SUPER_BLOCK

Bytes = NDArray[Any]  # uint8; numpy's stubs lose that in shifts


def parts_of(value: QuantizedTensor) -> list[NDArray[Any]]:
    """The parts of each block in their order on disk, [N, S, bytes] each, of a matrix in rows of whole blocks."""
    assert value.scale is not None and value.super_scale is not None
    codes = value.codes().numpy().reshape(value.shape[0], -1, SUPER_BLOCK)
    count = 1 + value.format.scale.has_minimum
    halves = np.split(value.super_scale.numpy(), count, -1)
    scales = np.split(value.scale.numpy(), count, -1)
    d = [np.ascontiguousarray(half[..., None]).view(np.uint8) for half in halves]
    grouped = [part.reshape(len(codes), codes.shape[1], -1) for part in scales]
    if value.format.name == "q2_k":
        return [grouped[0] | grouped[1] << 4, _pairs(codes), *d]
    if value.format.name == "q3_k":
        return [_bits(codes >> 2), _pairs(codes & 3), _six_bit_scales(grouped[0]), *d]
    if value.format.name == "q6_k":
        signed = (grouped[0].astype(np.int16) - 128).astype(np.int8)
        return [_low_nibbles(codes), _pairs(codes >> 4), signed.view(np.uint8), *d]
    high = [_bits(codes >> 4)] if value.format.name == "q5_k" else []
    nibbles = _fields(codes & 15, 2, 32)
    return [*d, _scales_and_minima(*grouped), *high, nibbles]


def _fields(codes: Bytes, count: int, run: int) -> Bytes:
    """Codes [N, S, 256] joined into bytes: field i of a byte is of the i-th of `count` runs of so many weights."""
    runs = codes.reshape(*codes.shape[:2], -1, count, run)
    joined = np.zeros((*runs.shape[:3], run), np.uint8)
    for index in range(count):
        joined |= runs[..., index, :] << (8 // count * index)
    return joined.reshape(*codes.shape[:2], -1)


def _bits(codes: Bytes) -> Bytes:
    return _fields(codes & 1, 8, 32)


def _pairs(codes: Bytes) -> Bytes:
    return _fields(codes & 3, 4, 32)


def _low_nibbles(codes: Bytes) -> Bytes:
    """Q6_K's: nibbles of weights 64 apart."""
    return _fields(codes & 15, 2, 64)


def _six_bit_scales(scales: Bytes) -> Bytes:
    """Q3_K's 16 codes: low nibbles of codes 8 apart in 8 bytes, then high pairs of codes 4 apart in 4."""
    low = (scales[..., :8] & 15) | (scales[..., 8:] & 15) << 4
    high = np.zeros((*scales.shape[:2], 4), np.uint8)
    for index in range(4):
        high |= (scales[..., 4 * index : 4 * index + 4] >> 4) << (2 * index)
    return np.concatenate([low, high], -1)


def _scales_and_minima(scales: Bytes, minima: Bytes) -> Bytes:
    """Q4_K's and Q5_K's 8 and 8 codes: the first four of each whole, in whose high bits are those of the others."""
    first = [part[..., :4] | (part[..., 4:] >> 4) << 6 for part in (scales, minima)]
    return np.concatenate([*first, (scales[..., 4:] & 15) | (minima[..., 4:] & 15) << 4], -1)
