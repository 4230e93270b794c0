"""How a block's stored scale is chosen from its weights, by the format's rule.

E8M0: `floor` is OCP's rule, `even` rounds amax to the element's mantissa first, `rceil` takes the smallest power of
two that does not saturate. bf16: amax / largest, or (high - low) / (2^b - 1), rounded to bf16 before any code is
computed. NVFP4: normal range only, as NVIDIA's tools choose them. `search` takes the scale of least squared error, and
so does every format where the error of each weight is given an importance, whatever its rule.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from aqtx.formats import super_blocks
from aqtx.formats.elements import EXPONENT_MASK, MANTISSA_BITS, code_to_value, round_value, value_to_code
from aqtx.formats.scale_search import least_error, search_real, settle
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
)
from aqtx.formats.table import E8M0, NVFP4_SCALE, Format, parse

EXPONENTS_TRIED = (0, 1, -1)  # from OCP's own
# E4M3 codes from that of amax / 6, eight to a factor of two: those above it hold amax / 4 (3/2 is 4 or 5 codes)
CODES_TRIED = (0, 1, 2, 3, 4, 5, 6, -1, -2, -3)
E4M3_SMALLEST_CODE, E4M3_LARGEST_CODE = 0x08, 0x7E  # of the normal range


def choose_for_blocks(
    blocks: Tensor,
    fmt: Format,
    dtype: torch.dtype,
    *,
    per_tensor: Tensor | None = None,
    importance: Tensor | None = None,
) -> Scales:
    """Stored scales of blocks [N, G, B]; `dtype` is what dequantized values will be rounded to.

    `importance` [G, B] weights the squared error of each place of a row, and makes the rule `search`.
    """
    if importance is not None:
        fmt = replace(fmt, rule="search")
    if fmt.scale.code_bits:
        return super_blocks.choose(blocks, fmt, importance)
    if fmt.scale is E8M0:
        return Scales(_choose_e8m0(blocks, fmt, importance))
    if fmt.scale is NVFP4_SCALE:
        assert per_tensor is not None
        return Scales(_choose_e4m3(blocks, fmt, per_tensor, importance), None, per_tensor)
    affine = _choose_real(blocks, fmt, dtype, importance)
    zero_point = None if affine.zero_point is None else affine.zero_point.to(torch.uint8)
    return Scales(affine.scale.to(torch.bfloat16), zero_point)


def nearest_scale(wanted: Tensor, fmt: Format, per_tensor: Tensor | None) -> Tensor:
    """The scale that the format can store nearest to `wanted`, decoded: float32 of the same shape; NaN stays NaN."""
    if fmt.scale is E8M0:
        below = (wanted.view(torch.int32) & EXPONENT_MASK).view(torch.float32)
        return torch.where(wanted < 1.5 * below, below, 2 * below)
    if fmt.scale is NVFP4_SCALE:
        assert per_tensor is not None
        ratio = wanted / per_tensor.view(-1, *[1] * (wanted.dim() - 1))
        found = code_to_value(_encode_e4m3(ratio), E4M3) * per_tensor.view(-1, *[1] * (wanted.dim() - 1))
        return torch.where(ratio.isnan(), float("nan"), found)
    return wanted.to(torch.bfloat16).float()


def stored_scale(decoded: Tensor, fmt: Format, per_tensor: Tensor | None) -> Tensor:
    """A decoded scale [E, ...] in the dtype that stores it, exactly."""
    if fmt.scale is E8M0:
        bits = decoded.view(torch.int32)
        return (bits >> MANTISSA_BITS).to(torch.uint8)  # the subnormal 2^-127 is byte 0
    if fmt.scale is NVFP4_SCALE:
        assert per_tensor is not None
        return _encode_e4m3(decoded / per_tensor.view(-1, *[1] * (decoded.dim() - 1)))
    return decoded.to(torch.bfloat16)


def per_matrix_scale(amax: Tensor) -> Tensor:
    """NVFP4's fp32 scale for the largest magnitude of a matrix: block scales then reach 448."""
    element = parse("nvfp4").element
    scale = amax
    for _ in range(3):  # once more from the value that it gives back, until it reproduces itself
        scale = amax / (E4M3.largest * element.largest)
        amax = E4M3.largest * scale * element.largest
    return torch.where(scale > 0, scale, torch.where(scale == 0, 1.0, float("nan")))


def _choose_e8m0(blocks: Tensor, fmt: Format, importance: Tensor | None) -> Tensor:
    amax = amax_of(blocks)
    rule: Callable[[Tensor, Format], Tensor] = {
        "floor": _exponent_floor,
        "even": _exponent_even,
        "rceil": _exponent_rceil,
        "search": _exponent_floor,
    }[fmt.rule]
    stored = rule(amax, fmt).clamp_(0, E8M0_LARGEST)
    if fmt.rule == "search":
        candidates = torch.stack([stored + step for step in EXPONENTS_TRIED]).clamp_(0, E8M0_LARGEST)
        best = least_error(blocks, Affine(decode_e8m0(candidates)), fmt, torch.float32, importance)
        stored = candidates.gather(0, best[None])[0]
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


def _choose_e4m3(blocks: Tensor, fmt: Format, per_tensor: Tensor, importance: Tensor | None) -> Tensor:
    wanted = amax_of(blocks) / fmt.element.largest / per_tensor
    stored = _encode_e4m3(wanted)
    if fmt.rule == "amax":
        return stored
    steps = torch.tensor(CODES_TRIED, device=stored.device).view(-1, *[1] * stored.dim())
    if importance is None:  # the matrix's largest weight is kept, or its own scale would be another one next time
        steps = torch.where(wanted > E4M3.largest * (1 - 2.0**-20), 0, steps)
    codes = (stored + steps).clamp(E4M3_SMALLEST_CODE, E4M3_LARGEST_CODE)
    best = least_error(blocks, Affine(code_to_value(codes, E4M3) * per_tensor), fmt, torch.float32, importance)
    return codes.gather(0, best[None])[0].to(torch.uint8)


def _encode_e4m3(scale: Tensor) -> Tensor:
    code = value_to_code(round_value(scale.clamp(E4M3_SMALLEST_NORMAL, E4M3.largest), E4M3), E4M3)
    return torch.where(scale.isnan(), 0x7F, code)


def _choose_real(blocks: Tensor, fmt: Format, dtype: torch.dtype, importance: Tensor | None) -> Affine:
    bounds = block_range(blocks, fmt)
    if fmt.rule == "search":
        return search_real(blocks, bounds, fmt, dtype, importance)
    return settle(blocks, bounds, affine_of_range(bounds, fmt), fmt, dtype)
