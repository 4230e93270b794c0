"""Scales that are codes: K-quants, whose blocks of 16 or 32 weights share half-precision scales by 256.

With d and m of a super-block and codes k, l of a block a value is `d k q`, k signed and q around zero, or
`d k q - m l`, all of them unsigned (ggml's `block_q2_K` to `block_q6_K`). `d k q` is exact in float32 where it is part
of a difference (11 + 6 + 5 bits), so that the difference is rounded once, whatever computes it.

Scales are chosen in three steps: the best real ones block by block; d and m so that the largest of a super-block are
reached; then codes next to those of the real ones, by the error that they lead to. No code of a scale is 0, as no
weight could be told from another there.

Legend: N rows, G blocks and S super-blocks a row, B weights a block.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from aqtx.formats.scale_search import least_error, search_real
from aqtx.formats.scales import Affine, Scales, amax_of, block_range, nearest_steps, per_block, snap_blocks
from aqtx.formats.table import BF16_SCALE, SUPER_BLOCK, Format

# of the full range, by bits of a code: few levels clip deeply
SHARES = {2: (1.0, 0.9, 0.8, 0.7, 0.6), 4: (1.04, 1.0, 0.96, 0.92, 0.88), 5: (1.02, 1.0, 0.97, 0.94)}
STEPS = (0, 1, -1, 2, -2)  # codes beside that of the best real scale
ROUNDS = 2  # of fitting scale and minimum to codes, and of trying codes of both
HALF_SMALLEST, HALF_LARGEST = 2.0**-24, 65504.0


def choose(blocks: Tensor, fmt: Format, importance: Tensor | None) -> Scales:
    """Scales of small squared error for blocks [N, G, B], weighted by `importance` [G, B]."""
    real = replace(fmt, scale=BF16_SCALE, rule="search", asymmetric=fmt.scale.has_minimum)
    finite = amax_of(blocks)
    if not fmt.scale.has_minimum:
        wanted = search_real(blocks, block_range(blocks, real), real, torch.float32, importance)
        supers = _supers(wanted.scale.abs() + 0 * finite, _most(fmt), fmt)
        return coded(_tried(blocks, wanted, supers, fmt, importance), supers, fmt)
    affine = _fitted(blocks, block_range(blocks, real), fmt, importance)
    assert affine.minimum is not None
    joined = torch.cat([_supers(part + 0 * finite, _most(fmt), fmt) for part in (affine.scale, affine.minimum)], -1)
    return coded(_tried_both(blocks, affine, joined, fmt, importance), joined, fmt)


def coded(affine: Affine, supers: Tensor, fmt: Format) -> Scales:
    """Stored form of scales (and minima) [.., N, G] that are multiples of those of super-blocks [.., N, S]."""
    codes = _code(affine.scale, _unit(supers, affine.scale.shape[-1], fmt))
    if affine.minimum is None:
        codes = codes + 2 ** (fmt.scale.code_bits - 1)
    else:
        unit = _unit(supers, affine.scale.shape[-1], fmt, of_minimum=True)
        codes = torch.cat([codes, _code(affine.minimum, unit)], -1)
    return Scales(codes.to(torch.uint8).contiguous(), super_scale=supers.contiguous())


def nearest(wanted: Tensor, supers: Tensor, block: int, fmt: Format, *, of_minimum: bool = False) -> Tensor:
    """What can be stored nearest to a scale or minimum [E, N] of one block, under supers [E, N, S]."""
    assert fmt.block is not None
    parts = supers.chunk(2, -1) if fmt.scale.has_minimum else (supers,)
    unit = parts[of_minimum][..., block * fmt.block // SUPER_BLOCK].float()
    codes = (wanted / unit).round()
    return (codes.clamp(0, _most(fmt)) if of_minimum else _usable(codes, wanted, fmt)) * unit


def _most(fmt: Format) -> int:
    """The largest code of a scale."""
    bits = fmt.scale.code_bits
    return 2**bits - 1 if fmt.scale.has_minimum else 2 ** (bits - 1) - 1


def _usable(codes: Tensor, wanted: Tensor, fmt: Format) -> Tensor:
    """Codes within their range, and never 0."""
    if fmt.scale.has_minimum:
        return codes.clamp(1, _most(fmt))
    return torch.where(codes == 0, torch.where(wanted < 0, -1.0, 1.0), codes).clamp(-_most(fmt) - 1, _most(fmt))


def _supers(largest: Tensor, most: int, fmt: Format) -> Tensor:
    """float16 [N, S] by which the largest of each super-block's blocks [N, G] reach the code `most`; NaN stays NaN."""
    assert fmt.block is not None
    times = SUPER_BLOCK // fmt.block
    grouped = pad(largest, (0, -largest.shape[-1] % times)).unflatten(-1, (-1, times))
    wanted = (grouped.amax(-1) / most).clamp(HALF_SMALLEST, HALF_LARGEST)
    half = wanted.to(torch.float16)
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where((half.float() < wanted) & (half < HALF_LARGEST), above, half)


def _unit(supers: Tensor, num_blocks: int, fmt: Format, *, of_minimum: bool = False) -> Tensor:
    """What a block's code is multiplied with: float32 [.., N, G]."""
    parts = supers.chunk(2, -1) if fmt.scale.has_minimum else (supers,)
    return per_block(parts[of_minimum].float(), num_blocks, fmt)


def _code(value: Tensor, unit: Tensor) -> Tensor:
    return (value / unit).round().nan_to_num(0.0)


def _tried(blocks: Tensor, wanted: Affine, supers: Tensor, fmt: Format, importance: Tensor | None) -> Affine:
    """The best of the codes next to those of the wanted scales, decoded."""
    unit = _unit(supers, blocks.shape[-2], fmt)
    codes = _code(wanted.scale, unit)
    candidates = torch.stack([_usable(codes + step, wanted.scale, fmt) * unit for step in STEPS])
    plain = replace(fmt, scale=BF16_SCALE)
    best = least_error(blocks, Affine(candidates), plain, torch.float32, importance)
    return Affine(candidates.gather(0, best[None])[0])


def _error(blocks: Tensor, affine: Affine, fmt: Format, importance: Tensor | None) -> Tensor:
    """Weighted squared error [N, G]."""
    off = (snap_blocks(blocks, affine, fmt) - blocks).square_()
    return (off if importance is None else off.mul_(importance)).sum(-1)


def _better(now: Affine, other: Affine, wins: Tensor) -> Affine:
    return Affine(
        *(torch.where(wins, b, a) for a, b in zip(now, other, strict=True) if a is not None and b is not None)
    )


def _fitted(blocks: Tensor, bounds: tuple[Tensor, Tensor], fmt: Format, importance: Tensor | None) -> Affine:
    """The best of scales and minima that are fitted to the codes of a range and of shares of it."""
    low, high = (bound.nan_to_num(0.0) for bound in bounds)
    steps = 2**fmt.element.bits - 1
    best, least = None, None
    for share in SHARES[fmt.element.bits]:
        scale = share * (high - low) / steps
        affine = Affine(torch.where(scale > 0, scale, 1.0), torch.zeros_like(low), -share * low)
        for _ in range(ROUNDS):
            affine = _least_squares(blocks, affine, fmt, importance)
        error = _error(blocks, affine, fmt, importance)
        if best is None or least is None:
            best, least = affine, error
        best, least = _better(best, affine, error < least), torch.minimum(error, least)
    assert best is not None
    return best


def _least_squares(blocks: Tensor, affine: Affine, fmt: Format, importance: Tensor | None) -> Affine:
    """Scale and minimum of least weighted error for the codes of given ones; these, where there are no better."""
    q = nearest_steps(blocks, affine, fmt, torch.float32)
    weights = torch.ones_like(blocks[:1, :1]) if importance is None else importance
    w, wq = weights.expand_as(q).sum(-1), (weights * q).sum(-1)
    wx, wqq, wqx = (weights * blocks).sum(-1), (weights * q * q).sum(-1), (weights * q * blocks).sum(-1)
    scale = (w * wqx - wq * wx) / (w * wqq - wq * wq)
    minimum = (scale * wq - wx) / w
    scale = torch.where(minimum < 0, wqx / wqq, scale)  # without a minimum
    usable = scale.isfinite() & minimum.isfinite() & (scale > 0)
    made = Affine(scale, affine.zero_point, minimum.clamp(min=0.0))
    return _better(affine, made, usable)


def _tried_both(blocks: Tensor, wanted: Affine, supers: Tensor, fmt: Format, importance: Tensor | None) -> Affine:
    """The best codes of scale and minimum next to those wanted, one step at a time, decoded."""
    units = [_unit(supers, blocks.shape[-2], fmt, of_minimum=which) for which in (False, True)]
    assert wanted.minimum is not None
    scale, minimum = _code(wanted.scale, units[0]), _code(wanted.minimum, units[1])

    def affine(of_scale: Tensor, of_minimum: Tensor) -> Affine:
        low = of_minimum.clamp(0, _most(fmt)) * units[1]
        return Affine(_usable(of_scale, wanted.scale, fmt) * units[0], torch.zeros_like(low), low)

    best = affine(scale, minimum)
    error = _error(blocks, best, fmt, importance)
    for _ in range(ROUNDS):
        at = [_code(best.scale, units[0]), _code(best.minimum, units[1])]  # type: ignore[arg-type]
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                other = affine(at[0] + i, at[1] + j)
                now = _error(blocks, other, fmt, importance)
                best, error = _better(best, other, now < error), torch.minimum(now, error)
    return best
