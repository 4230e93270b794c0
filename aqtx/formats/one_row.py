"""The product of one row with a packed weight in plain torch, shaped for Inductor's vectoriser.

The row of codes is read slab by slab (16 neighbouring bytes, see packing.py): shift, mask, arithmetic
on bits, times 16 neighbouring activations, all summed in one reduction. No gather, no stack, nothing
interleaved, so the weight is read once and never written out.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aqtx.formats.elements import code_to_value
from aqtx.formats.packing import LANES, PLANES, padded_columns, stored
from aqtx.formats.scales import decode_scale


def span_of(weight: Any) -> int:
    """Elements handled together: the longest whole number of slabs of every plane that divides a row."""
    bits = weight.format.element.bits
    padded = padded_columns(weight.num_columns, bits)
    shortest = LANES * 8 // min(PLANES[bits])
    return next(span for span in (128, 64, 32, 16) if span == shortest or (span > shortest and padded % span == 0))


def fits(weight: Any) -> bool:
    """Whether a row is whole spans and its blocks are spans or parts of one."""
    fmt, num_columns = weight.format, weight.num_columns
    if weight.dim() != 2 or not fmt.is_packed or fmt.scale.code_bits:
        return False
    span, size = span_of(weight), fmt.block_size(num_columns)
    one_block = fmt.num_blocks(num_columns) == 1
    return num_columns % span == 0 and (
        one_block or (num_columns % size == 0 and (size % span == 0 or span % size == 0))
    )


def product(x: Tensor, weight: Any) -> Tensor:
    """`x @ weight.T` for a single row x [..., K]."""
    span = span_of(weight)
    rows = stored(x.reshape(-1, span // LANES, LANES).float())
    sums: dict[int, Any] = {}  # of the slabs under one scale, which multiplies once
    scale, slabs = _slabs(weight, span)
    for index, (value, block) in enumerate(slabs):
        part = value * rows[:, index]
        sums[block] = sums[block] + part if block in sums else part
    total: Any = sum(part * scale[..., block, None] for block, part in sums.items())
    y = total.sum((-1, -2)).to(x.dtype)
    return y.view(*x.shape[:-1], -1)


def _slabs(weight: Any, span: int) -> tuple[Tensor, Iterator[tuple[Tensor, int]]]:
    """Scales [N, K / span, blocks], and of each slab of a span: values [N, K / span, 16] and its block."""
    fmt, size = weight.format, weight.format.block_size(weight.num_columns)
    scale = _per_span(stored(decode_scale(weight.scales, fmt)), weight.num_columns, size, span)
    zero = None if weight.zero_point is None else _per_span(weight.zero_point, weight.num_columns, size, span)

    def values() -> Iterator[tuple[Tensor, int]]:
        for index in range(span // LANES):
            block = LANES * index // size if size < span else 0
            codes = _slab_codes(weight.qdata, fmt.element.bits, weight.num_columns, span, index)
            yield code_to_value(codes, fmt.element, None if zero is None else zero[..., block, None]), block

    return scale, values()


def _per_span(parts: Tensor, num_columns: int, size: int, span: int) -> Tensor:
    """Scales [N, G] as [N, K / span, blocks within a span]."""
    if size < span and parts.shape[-1] > 1:
        return parts.unflatten(-1, (-1, span // size))
    num_spans = num_columns // span
    times = num_spans // parts.shape[-1]
    expanded = parts[..., None].expand(*parts.shape, times).reshape(*parts.shape[:-1], num_spans)
    return expanded[..., None]


def _slab_codes(qdata: Tensor, bits: int, num_columns: int, span: int, index: int) -> Tensor:
    """int32 codes [N, K / span, 16] of the index-th slab of every span."""
    codes: Any = None
    start = shift = 0
    for width in PLANES[bits]:
        size = num_columns * width // 8
        per_byte = 8 // width
        slab = qdata[..., start : start + size].unflatten(-1, (num_columns // span, span // LANES // per_byte, LANES))
        part = _field(slab[..., index // per_byte, :].to(torch.int32), width, index % per_byte)
        codes = part if codes is None else codes | (part << shift)
        start, shift = start + size, shift + width
    return codes


def _field(byte: Tensor, width: int, place: int) -> Tensor:
    """Bits [width * place, width * (place + 1)) of a byte, without shifts and masks that change nothing."""
    shifted = byte >> (width * place) if place else byte
    return shifted if width * (place + 1) == 8 else shifted & ((1 << width) - 1)
