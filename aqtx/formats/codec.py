"""The codec: weights to packed codes and back, for every row of the table by the same few steps.

choose scales per block -> divide -> round to the element's grid -> code -> pack. All of it in float32,
whatever the weight's dtype, in pieces of rows that stay in the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.formats import kernel
from aqtx.formats.decode import to_storage_dtype
from aqtx.formats.elements import value_to_code
from aqtx.formats.packing import memory_bytes, pack, stored
from aqtx.formats.scale_rules import choose_for_blocks, per_matrix_scale
from aqtx.formats.scales import (
    E8M0_NAN,
    Affine,
    Scales,
    decode_affine,
    decode_scale,
    nearest_steps,
    snap_blocks,
    to_blocks,
)  # fmt: skip
from aqtx.formats.table import NVFP4_SCALE, Format, parse
from aqtx.formats.tensor import QuantizedTensor

__all__ = [
    "Scales", "all_finite", "check_finite", "choose_scales", "decode_scale", "encode", "fake_quantize",
    "nearest_codes", "nearest_values", "packed", "quantize",
]  # fmt: skip

SCALES_AT_ONCE = 4  # pieces whose scales are chosen together: what that takes is mostly calls
CHUNK_ELEMENTS = 1 << 17  # a float32 piece of this size and its temporaries stay in a core's L2 cache


def quantize(
    weight: Tensor, name: str | Format, scale_rule: str | None = None, *, largest: Tensor | None = None
) -> QuantizedTensor:
    """Round a weight [N, K] or [E, N, K] to the nearest codes of a format. NaN and infinity are errors.

    `largest` [.., 1, 1] is the magnitude that NVFP4's scale of a matrix is for, where it is not the matrix's own.
    """
    fmt = parse(name, scale_rule=scale_rule)
    if weight.dim() < 2 or not weight.dtype.is_floating_point or not weight.shape[-1]:
        what = f"a {weight.dtype} tensor of shape {list(weight.shape)}"
        raise InputError(f"cannot quantize {what}: it takes a float weight [.., N, K]")
    weight = weight.detach()
    if kernel.can_quantize(weight, fmt):
        qdata, scale = kernel.quantize_mx(weight, fmt, memory_bytes(weight.shape[-1], fmt.element.bits))
        if bool((scale == E8M0_NAN).any()):
            check_finite(weight)
        return QuantizedTensor(qdata, fmt.name, weight.shape[-1], weight.dtype, scale)
    check_finite(weight)
    return encode(weight, fmt, choose_scales(weight, fmt, largest=largest))


def fake_quantize(weight: Tensor, name: str | Format, scale_rule: str | None = None) -> Tensor:
    """`quantize(weight, name).dequantize()` without the codes: same dtype and shape. NaN and inf become NaN."""
    fmt = parse(name, scale_rule=scale_rule)
    if not fmt.is_packed:
        return _round_to_bf16(weight).to(weight.dtype)
    return nearest_values(weight, fmt, choose_scales(weight, fmt))


def nearest_values(weight: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """The values that `encode` finds codes for: same dtype and shape as the weight."""
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows, part, target in _pieces(weight, scales, fmt, out):
        values = stored(snap_blocks(to_blocks(rows, fmt), part, fmt, weight.dtype).flatten(-2))[..., : weight.shape[-1]]
        target.copy_(to_storage_dtype(values, weight.dtype))
    return out


def choose_scales(
    weight: Tensor, fmt: Format, importance: Tensor | None = None, *, largest: Tensor | None = None
) -> Scales:
    """Stored scales of a weight [..., N, K] by the format's rule.

    With the `importance` of each input channel [K]: those of least squared error weighted by it. `largest` as in
    `quantize`.
    """
    if not fmt.is_packed:
        return Scales(weight.new_empty(0))
    per_tensor = None
    if fmt.scale is NVFP4_SCALE:
        own = weight.abs().amax((-2, -1), keepdim=True) if largest is None else largest
        per_tensor = per_matrix_scale(own.float())
    pieces = []
    row_scale = None if per_tensor is None else per_tensor.expand(*weight.shape[:-1], 1).reshape(-1, 1)
    rows = weight.reshape(-1, weight.shape[-1])
    weights = None if importance is None else to_blocks(importance, fmt)
    step = SCALES_AT_ONCE * _rows_per_piece(weight)
    for start in range(0, max(len(rows), 1), step):
        blocks = to_blocks(rows[start : start + step], fmt)
        part = None if row_scale is None else row_scale[start : start + step]
        pieces.append(choose_for_blocks(blocks, fmt, weight.dtype, per_tensor=part, importance=weights))
    leading = weight.shape[:-1]
    scale = torch.cat([piece.scale for piece in pieces]).unflatten(0, leading)
    if pieces[0].zero_point is None:
        supers = [piece.super_scale for piece in pieces if piece.super_scale is not None]
        return Scales(scale, None, per_tensor, torch.cat(supers).unflatten(0, leading) if supers else None)
    zeros = [piece.zero_point for piece in pieces if piece.zero_point is not None]
    return Scales(scale, torch.cat(zeros).unflatten(0, leading))


def encode(weight: Tensor, name: str | Format, scales: Scales) -> QuantizedTensor:
    """The packed codes of the nearest values at the given scales."""
    fmt = parse(name)
    if not fmt.is_packed:
        return QuantizedTensor(_round_to_bf16(weight).contiguous(), fmt.name, weight.shape[-1], weight.dtype)
    parts = [pack(codes, fmt.element.bits) for codes in _codes(weight, fmt, scales)]
    return _assembled(torch.cat(parts).unflatten(0, weight.shape[:-1]), weight.shape[-1], fmt, scales, weight.dtype)


def nearest_codes(weight: Tensor, fmt: Format, scales: Scales) -> Tensor:
    """What `encode` packs: uint8 [.., N, K], one code each."""
    return torch.cat(list(_codes(weight, fmt, scales))).unflatten(0, weight.shape[:-1])


def packed(codes: Tensor, fmt: Format, scales: Scales, dtype: torch.dtype) -> QuantizedTensor:
    """The weight of `dtype` that codes [.., N, K], one a byte, mean at the given scales."""
    return _assembled(pack(codes, fmt.element.bits), codes.shape[-1], fmt, scales, dtype)


def _assembled(qdata: Tensor, num_columns: int, fmt: Format, scales: Scales, dtype: torch.dtype) -> QuantizedTensor:
    scale, *others = scales
    return QuantizedTensor(qdata, fmt.name, num_columns, dtype, scale.contiguous(), *others)


def _codes(weight: Tensor, fmt: Format, scales: Scales) -> Iterator[Tensor]:
    """Nearest codes of run after run of rows."""
    for rows, part, _ in _pieces(weight, scales, fmt):
        blocks = to_blocks(rows, fmt)
        zero_point = None if part.zero_point is None else part.zero_point.unsqueeze(-1)
        values = nearest_steps(blocks, part, fmt, weight.dtype)
        yield stored(value_to_code(values, fmt.element, zero_point).flatten(-2))[..., : weight.shape[-1]]


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # one of them would show in the sum, which is cheap; a finite x whose sum overflows is looked at again
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())


def check_finite(weight: Tensor, name: str = "the weight") -> None:
    """InputError with the first index of a NaN or an infinity, if there is one."""
    if not all_finite(weight):
        index = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise InputError(f"{name} has {float(weight[tuple(index)])} at index {index}: nothing to quantize it to")


def _round_to_bf16(weight: Tensor) -> Tensor:
    """The largest float32 values stay finite; infinity is not a value and becomes NaN."""
    finite = to_storage_dtype(weight.float(), torch.bfloat16)
    return torch.where(torch.isfinite(weight), finite, float("nan"))


def _rows_per_piece(weight: Tensor) -> int:
    return max(CHUNK_ELEMENTS // max(weight.shape[-1], 1), 1)


def _pieces(
    weight: Tensor, scales: Scales, fmt: Format, out: Tensor | None = None
) -> Iterator[tuple[Tensor, Affine, Tensor]]:
    """Cache-sized runs of rows with their decoded scales, and where their results go."""
    rows = weight.reshape(-1, weight.shape[-1])
    decoded = decode_affine(scales, fmt)
    num_blocks = decoded.scale.shape[-1]
    parts = [None if part is None else part.reshape(-1, num_blocks) for part in decoded]
    target = rows if out is None else out.view(-1, weight.shape[-1])
    step = _rows_per_piece(weight)
    for start in range(0, max(len(rows), 1), step):
        run = slice(start, start + step)
        yield rows[run], Affine(*(None if part is None else part[run] for part in parts)), target[run]  # type: ignore[arg-type]
