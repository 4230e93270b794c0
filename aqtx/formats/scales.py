"""Scales: blocks, what a stored scale means, and what its values are.

Legend: N rows, K columns, G blocks per row, B weights per block; blocks are [..., N, G, B] float32,
a ragged last block padded with zeros (zero is a value of every format, so padding changes nothing).

E8M0 (MX): byte e means 2^(e-127), 255 is NaN. Real scales are bf16. NVFP4: E4M3 bytes under one fp32 scale per matrix.
K-quants: integers under a half-precision scale for each 256 weights, with minima of the same kind behind them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from aqtx.formats.elements import MANTISSA_BITS, code_to_value, round_value
from aqtx.formats.packing import stored
from aqtx.formats.table import E8M0, NVFP4_SCALE, SUPER_BLOCK, Format, parse

E8M0_NAN = 255
E8M0_LARGEST = 254
E4M3 = parse("mxfp8_e4m3").element
E4M3_SMALLEST_NORMAL = 2.0**-6


class Scales(NamedTuple):
    """Stored scales of a weight, [..., N, G] in the stored dtype, and what else its blocks need."""

    scale: Tensor
    zero_point: Tensor | None = None
    per_tensor_scale: Tensor | None = None  # NVFP4: float32 [..., 1, 1]
    super_scale: Tensor | None = None  # K-quants: float16 [..., N, S] or, with those of minima, [..., N, 2 S]


class Affine(NamedTuple):
    """A decoded candidate: float32 scale (in bf16's grid where that is stored), zero point, what values are less by."""

    scale: Tensor
    zero_point: Tensor | None = None
    minimum: Tensor | None = None


def to_blocks(weight: Tensor, fmt: Format) -> Tensor:
    """[..., K] in any dtype -> float32 [..., G, B], the last block padded with zeros."""
    num_columns = weight.shape[-1]
    size = fmt.block_size(num_columns)
    missing = fmt.num_blocks(num_columns) * size - num_columns
    values = weight.float()
    return (pad(values, (0, missing)) if missing else values).unflatten(-1, (-1, size))


def snap_blocks(blocks: Tensor, affine: Affine, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks [..., G, B] of a weight of `dtype` rounded to the format's values at the given scales [..., G]."""
    values = nearest_steps(blocks, affine, fmt, dtype).mul_(affine.scale.unsqueeze(-1))
    return values if affine.minimum is None else values.sub_(affine.minimum.unsqueeze(-1))


def nearest_steps(blocks: Tensor, affine: Affine, fmt: Format, dtype: torch.dtype) -> Tensor:
    """Element values [..., G, B] nearest to blocks of a weight of `dtype`, in steps of the scales [..., G].

    bf16 holds fewer numbers than 256 steps: below a power of two lie more of them than above it, so that the step
    nearest to a number of bf16 may be stored as another one while its neighbour is stored as that very number.
    """
    scale = affine.scale.unsqueeze(-1)
    zero_point = None if affine.zero_point is None else affine.zero_point.unsqueeze(-1)
    blocks = blocks if affine.minimum is None else blocks + affine.minimum.unsqueeze(-1)
    steps = round_value(blocks / scale, fmt.element, zero_point)
    if zero_point is None or fmt.element.bits < 8 or dtype is not torch.bfloat16:
        return steps
    missed = blocks - (steps * scale).to(dtype).float()
    beside = round_value(steps + missed.sign(), fmt.element, zero_point)
    return torch.where((missed != 0) & ((beside * scale).to(dtype).float() == blocks), beside, steps)


def decode_affine(scales: Scales, fmt: Format) -> Affine:
    """All that the stored scales mean, float32 [..., N, G] each; codes under a minimum count from 0."""
    minimum = decode_minimum(scales, fmt)
    zero_point = scales.zero_point if minimum is None else torch.zeros_like(minimum)
    return Affine(decode_scale(scales, fmt), zero_point, minimum)


def decode_minimum(scales: Scales, fmt: Format) -> Tensor | None:
    """float32 [..., N, G] that is subtracted from the values of a block, None where nothing is."""
    if not fmt.scale.has_minimum:
        return None
    assert scales.super_scale is not None
    supers, codes = scales.super_scale.chunk(2, -1)[1], scales.scale.chunk(2, -1)[1]
    return per_block(supers.float(), codes.shape[-1], fmt) * codes.float()


def per_block(supers: Tensor, num_blocks: int, fmt: Format) -> Tensor:
    """What super-blocks [..., S] share, said for each of their blocks: [..., G]."""
    assert fmt.block is not None
    times = SUPER_BLOCK // fmt.block
    # of a single super-block the flattened view would have a stride of 0, which `stored` must not see
    spread = supers.unsqueeze(-1).expand(*supers.shape, times).flatten(-2).contiguous()
    return spread if spread.shape[-1] == num_blocks else stored(spread)[..., :num_blocks]


def decode_scale(scales: Scales, fmt: Format) -> Tensor:
    """float32 [..., N, G] that the stored scales mean."""
    if bits := fmt.scale.code_bits:
        assert scales.super_scale is not None
        if fmt.scale.has_minimum:
            supers, codes = scales.super_scale.chunk(2, -1)[0], scales.scale.chunk(2, -1)[0].float()
        else:
            supers, codes = scales.super_scale, scales.scale.float() - 2 ** (bits - 1)
        return per_block(supers.float(), codes.shape[-1], fmt) * codes
    if fmt.scale is E8M0:
        return decode_e8m0(scales.scale)
    if fmt.scale is NVFP4_SCALE:
        assert scales.per_tensor_scale is not None
        return code_to_value(scales.scale, E4M3) * scales.per_tensor_scale
    return scales.scale.float()


def decode_e8m0(stored: Tensor) -> Tensor:
    """2^(byte - 127), exact: byte 0 is the subnormal 2^-127, byte 255 is NaN."""
    bits = (stored.to(torch.int32) << MANTISSA_BITS).clamp_(min=1 << (MANTISSA_BITS - 1))
    return torch.where(stored == E8M0_NAN, float("nan"), bits.view(torch.float32))


def amax_of(blocks: Tensor) -> Tensor:
    """Largest magnitude of each block; NaN where anything in it is NaN or infinite."""
    amax = blocks.abs().amax(-1)
    return torch.where(amax < float("inf"), amax, float("nan"))


def block_range(blocks: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """(low, high) that the codes must span: -amax and amax, or the block's own range with 0 in it."""
    if not fmt.asymmetric:
        amax = amax_of(blocks)
        return -amax, amax
    low, high = blocks.amin(-1).clamp(max=0.0), blocks.amax(-1).clamp(min=0.0)
    finite = (high - low) < float("inf")
    return torch.where(finite, low, float("nan")), torch.where(finite, high, float("nan"))


def affine_of_range(bounds: tuple[Tensor, Tensor], fmt: Format) -> Affine:
    """Scale and zero point that make the codes span the bounds."""
    low, high = bounds
    steps = 2**fmt.element.bits - 1
    wanted = (high - low) / steps if fmt.asymmetric else high / fmt.element.largest
    return affine_of_scale(wanted, low, fmt)


def affine_of_scale(wanted: Tensor, low: Tensor, fmt: Format) -> Affine:
    """The scale as bf16 stores it (1 where it would be 0, never infinite) and the zero point that goes with it."""
    largest = torch.finfo(torch.bfloat16).max
    scale = wanted.clamp(-largest, largest).to(torch.bfloat16).float()
    scale = torch.where(scale == 0, 1.0, scale)
    if not fmt.asymmetric:
        return Affine(scale)
    zero_point = (-low / scale).round().clamp(0, 2**fmt.element.bits - 1)
    return Affine(scale, zero_point.nan_to_num(0.0))
