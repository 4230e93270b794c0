"""Scales: how a block's stored scale is chosen from its weights, and what the stored scale means.

Legend: N rows, K columns, G blocks per row, B weights per block; blocks are [..., N, G, B] float32,
a ragged last block padded with zeros (zero is a value of every format, so padding changes nothing).

E8M0 (MX): byte e means 2^(e-127), 255 is NaN. `floor` is OCP's rule, `even` rounds amax to the
element's mantissa first, `rceil` takes the smallest power of two that does not saturate.
bf16: amax / largest, or (high - low) / (2^b - 1), rounded to bf16 before any code is computed.
NVFP4: E4M3 bytes under one fp32 scale per matrix, normal range only, as NVIDIA's tools choose them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from aqtx.formats.elements import MANTISSA_BITS, code_to_value, round_value, value_to_code
from aqtx.formats.table import E8M0, NVFP4_SCALE, Format, parse

E8M0_NAN = 255
E8M0_LARGEST = 254
E4M3 = parse("mxfp8_e4m3").element
E4M3_SMALLEST_NORMAL = 2.0**-6


class Scales(NamedTuple):
    """Stored scales of a weight, [..., N, G] in the stored dtype, and what else its blocks need."""

    scale: Tensor
    zero_point: Tensor | None = None
    per_tensor_scale: Tensor | None = None  # NVFP4: float32 [..., 1, 1]


class Affine(NamedTuple):
    """A decoded candidate: float32 scale (in bf16's grid where that is stored) and zero point."""

    scale: Tensor
    zero_point: Tensor | None = None


def to_blocks(weight: Tensor, fmt: Format) -> Tensor:
    """[..., K] in any dtype -> float32 [..., G, B], the last block padded with zeros."""
    num_columns = weight.shape[-1]
    size = fmt.block_size(num_columns)
    missing = fmt.num_blocks(num_columns) * size - num_columns
    values = weight.float()
    return (pad(values, (0, missing)) if missing else values).unflatten(-1, (-1, size))


def snap_blocks(blocks: Tensor, affine: Affine, fmt: Format) -> Tensor:
    """Blocks [..., G, B] rounded to the format's values at the given scales [..., G]."""
    scale = affine.scale.unsqueeze(-1)
    zero_point = None if affine.zero_point is None else affine.zero_point.unsqueeze(-1)
    return round_value(blocks / scale, fmt.element, zero_point).mul_(scale)


def decode_scale(scales: Scales, fmt: Format) -> Tensor:
    """float32 [..., N, G] that the stored scales mean."""
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


def choose_for_blocks(blocks: Tensor, fmt: Format, dtype: torch.dtype, per_tensor: Tensor | None = None) -> Scales:
    """Stored scales of blocks; `dtype` is what dequantized values will be rounded to."""
    if fmt.scale is E8M0:
        return Scales(_choose_e8m0(blocks, fmt))
    if fmt.scale is NVFP4_SCALE:
        assert per_tensor is not None
        return Scales(_choose_e4m3(blocks, fmt, per_tensor), None, per_tensor)
    affine = _choose_real(blocks, fmt, dtype)
    zero_point = None if affine.zero_point is None else affine.zero_point.to(torch.uint8)
    return Scales(affine.scale.to(torch.bfloat16), zero_point)


def per_matrix_scale(amax: Tensor) -> Tensor:
    """NVFP4's fp32 scale for the largest magnitude of a matrix: block scales then reach 448."""
    element = parse("nvfp4").element
    scale = amax
    for _ in range(3):  # once more from the value that it gives back, until it reproduces itself
        scale = amax / (E4M3.largest * element.largest)
        amax = E4M3.largest * scale * element.largest
    return torch.where(scale > 0, scale, torch.where(scale == 0, 1.0, float("nan")))


def _amax(blocks: Tensor) -> Tensor:
    """Largest magnitude of each block; NaN where anything in it is NaN or infinite."""
    amax = blocks.abs().amax(-1)
    return torch.where(amax < float("inf"), amax, float("nan"))


def _choose_e8m0(blocks: Tensor, fmt: Format) -> Tensor:
    amax = _amax(blocks)
    rule: Callable[[Tensor, Format], Tensor] = {
        "floor": _exponent_floor,
        "even": _exponent_even,
        "rceil": _exponent_rceil,
        "search": _exponent_floor,
    }[fmt.rule]
    stored = rule(amax, fmt).clamp_(0, E8M0_LARGEST)
    if fmt.rule == "search":
        candidates = [(stored + step).clamp_(0, E8M0_LARGEST) for step in (0, 1, -1)]
        best = least_error(blocks, [Affine(decode_e8m0(byte)) for byte in candidates], fmt, torch.float32)
        stored = torch.stack(candidates).gather(0, best[None])[0]
    return torch.where(amax.isnan(), E8M0_NAN, stored).to(torch.uint8)


def _exponent_floor(amax: Tensor, fmt: Format) -> Tensor:
    return (amax.view(torch.int32) >> MANTISSA_BITS) - fmt.element.max_exponent


def _exponent_even(amax: Tensor, fmt: Format) -> Tensor:
    half = 1 << (MANTISSA_BITS - fmt.element.mantissa_bits - 1)
    return ((amax.view(torch.int32) + half) >> MANTISSA_BITS) - fmt.element.max_exponent


def _exponent_rceil(amax: Tensor, fmt: Format) -> Tensor:
    """Exponent of amax / largest, rounded up on its bits: exact at powers of two, where log2 is not."""
    bits = (amax / fmt.element.largest).view(torch.int32)
    round_up = (bits & ((1 << MANTISSA_BITS) - 1)) > 0
    # a subnormal quotient is at most 2^-127 only up to half of the subnormal range
    tiny = bits <= 1 << (MANTISSA_BITS - 1)
    return torch.where(tiny, 0, (bits >> MANTISSA_BITS) + round_up)


def _choose_e4m3(blocks: Tensor, fmt: Format, per_tensor: Tensor) -> Tensor:
    wanted = _amax(blocks) / fmt.element.largest / per_tensor
    stored = _encode_e4m3(wanted)
    if fmt.rule == "amax":
        return stored
    # a block's largest weight becomes 6, or 4 where the spacing below it fits the block better
    codes = [stored, torch.where(wanted < E4M3.largest, stored + 1, stored), _encode_e4m3(wanted * 1.5)]
    codes = [code.clamp(max=0x7E) for code in codes]
    decoded = [Affine(code_to_value(code, E4M3) * per_tensor) for code in codes]
    best = least_error(blocks, decoded, fmt, torch.float32)
    return torch.stack(codes).gather(0, best[None])[0]


def _encode_e4m3(scale: Tensor) -> Tensor:
    code = value_to_code(round_value(scale.clamp(E4M3_SMALLEST_NORMAL, E4M3.largest), E4M3), E4M3)
    return torch.where(scale.isnan(), 0x7F, code)


def _choose_real(blocks: Tensor, fmt: Format, dtype: torch.dtype) -> Affine:
    from aqtx.formats.scale_search import search_real, settle

    bounds = block_range(blocks, fmt)
    if fmt.rule == "search":
        return search_real(blocks, bounds, fmt, dtype)
    return settle(blocks, bounds, affine_of_range(bounds, fmt), fmt, dtype)


def block_range(blocks: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """(low, high) that the codes must span: -amax and amax, or the block's own range with 0 in it."""
    if not fmt.asymmetric:
        amax = _amax(blocks)
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


def least_error(blocks: Tensor, candidates: list[Affine], fmt: Format, dtype: torch.dtype) -> Tensor:
    """Index [..., G] of the candidate of least squared error, the first one among equals."""
    errors = torch.stack([squared_error(blocks, affine, fmt, dtype) for affine in candidates])
    return errors.argmin(0)


def squared_error(blocks: Tensor, affine: Affine, fmt: Format, dtype: torch.dtype) -> Tensor:
    """Per block, between the weights and their dequantized values as `dtype` holds them."""
    snapped = snap_blocks(blocks, affine, fmt)
    if dtype is not torch.float32:
        snapped = snapped.to(dtype).float()
    return snapped.sub_(blocks).square_().sum(-1)
