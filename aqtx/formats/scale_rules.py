"""How a block's stored scale is chosen from its weights, by the format's rule.

E8M0: `floor` is OCP's rule, `even` rounds amax to the element's mantissa first, `rceil` takes the smallest power of
two that does not saturate. bf16: amax / largest, or (high - low) / (2^b - 1), rounded to bf16 before any code is
computed. NVFP4: normal range only, as NVIDIA's tools choose them. `search` takes the scale of least squared error.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from aqtx.formats.elements import MANTISSA_BITS, code_to_value, round_value, value_to_code
from aqtx.formats.scale_search import search_real, settle
from aqtx.formats.scales import (
    E4M3,
    E4M3_SMALLEST_NORMAL,
    E8M0_LARGEST,
    E8M0_NAN,
    Affine,
    Scales,
    affine_of_range,
    amax_of,
    block_range,
    decode_e8m0,
    least_error,
)
from aqtx.formats.table import E8M0, NVFP4_SCALE, Format, parse


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


def _choose_e8m0(blocks: Tensor, fmt: Format) -> Tensor:
    amax = amax_of(blocks)
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
    wanted = amax_of(blocks) / fmt.element.largest / per_tensor
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
    bounds = block_range(blocks, fmt)
    if fmt.rule == "search":
        return search_real(blocks, bounds, fmt, dtype)
    return settle(blocks, bounds, affine_of_range(bounds, fmt), fmt, dtype)
