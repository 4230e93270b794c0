"""Rounding to an element's grid, and the way between its values and its codes.

Floats: the spacing of the grid at |v| in [2^e, 2^(e+1)) is 2^(e-m) for m mantissa bits. Adding and
subtracting 1.5 * 2^(e + 23 - m) in float32 leaves the nearest multiple of that spacing, ties to
even, because the sum's last bit has just that weight. Subnormals share the smallest exponent.
All of it is vectorised arithmetic on bits: no table, no gather, nothing that a compiler scalarises.

Integers are stored offset-binary: code = value + zero point, and a symmetric format's zero point
is 2^(b-1). Floats are stored as sign, exponent, mantissa from the high bit down.
"""

import torch
from torch import Tensor

from aqtx.formats.table import Element

MANTISSA_BITS = 23  # of float32
EXPONENT_MASK = 0x7F800000
BIAS = 127


def round_value(v: Tensor, element: Element, zero_point: Tensor | None = None) -> Tensor:
    """Nearest element value of `v` (float32, already divided by the scale): ties to even, saturating."""
    if not element.is_float:
        return _round_integer(v, element, zero_point)
    low_exponent = 2.0**element.min_exponent
    to_magic = 1.5 * 2.0 ** (MANTISSA_BITS - element.mantissa_bits)
    clamped = v.clamp(-element.largest, element.largest)
    magic = (clamped.view(torch.int32) & EXPONENT_MASK).view(torch.float32).clamp_(min=low_exponent).mul_(to_magic)
    # the sign survives rounding to zero: -0 has a code of its own
    return torch.copysign((clamped + magic).sub_(magic), v)


def _round_integer(v: Tensor, element: Element, zero_point: Tensor | None) -> Tensor:
    half = 2 ** (element.bits - 1)
    if zero_point is None:
        return v.round().clamp_(-half, half - 1)
    zero = zero_point.to(torch.float32)
    return torch.minimum(torch.maximum(v.round(), -zero), (2 * half - 1) - zero)


def value_to_code(value: Tensor, element: Element, zero_point: Tensor | None = None) -> Tensor:
    """uint8 codes of values that lie on the element's grid."""
    if not element.is_float:
        zero: Tensor | int = 2 ** (element.bits - 1) if zero_point is None else zero_point.to(torch.float32)
        return (value + zero).to(torch.uint8)
    drop = MANTISSA_BITS - element.mantissa_bits
    magnitude = value.abs()
    smallest = 2.0**element.min_exponent
    # a subnormal k * 2^(emin - m) lands, with 2^emin added, in the mantissa bits of that sum
    shifted = torch.where(magnitude < smallest, magnitude + smallest, magnitude).view(torch.int32) >> drop
    exponent_offset = (BIAS + element.min_exponent) << element.mantissa_bits
    code = shifted - torch.where(magnitude < smallest, exponent_offset, exponent_offset - (1 << element.mantissa_bits))
    sign = (value.view(torch.int32) >> (32 - element.bits)) & (1 << (element.bits - 1))
    return (code | sign).to(torch.uint8)


def code_to_value(code: Tensor, element: Element, zero_point: Tensor | None = None) -> Tensor:
    """float32 values of codes (any integer dtype)."""
    if not element.is_float:
        zero: Tensor | float = float(2 ** (element.bits - 1)) if zero_point is None else zero_point.to(torch.float32)
        return code.to(torch.float32) - zero
    bits = code.to(torch.int32)
    sign_bit = 1 << (element.bits - 1)
    drop = MANTISSA_BITS - element.mantissa_bits
    magnitude = bits & (sign_bit - 1)
    # the code read as if it were normal; a subnormal f * 2^emin then reads (1 + f) * 2^(emin-1), which falls
    # short of 2^emin by as much as it is too large
    normal = ((magnitude << drop) + ((BIAS - element.exponent_bias) << MANTISSA_BITS)).view(torch.float32)
    value = normal - torch.relu(2.0**element.min_exponent - normal)
    if element.has_specials:
        value = _with_specials(value, magnitude, element)
    return (value.view(torch.int32) | ((bits & sign_bit) << (32 - element.bits))).view(torch.float32)


def _with_specials(value: Tensor, magnitude: Tensor, element: Element) -> Tensor:
    """Codes above the largest value: E5M2's first one is infinity, all others are NaN."""
    special = torch.where(value > element.largest, float("nan"), value)
    if element.mantissa_bits == 2:
        return torch.where(magnitude == 0x7C, float("inf"), special)
    return special
