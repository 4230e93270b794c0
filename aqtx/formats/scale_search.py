"""Scales beyond the plain rule: the search for least squared error, and settling.

The search tries the scales that a format can store near the block's own: E8M0 exponents beside it, a run of E4M3
codes that reaches from clipping to 3/2 (so that a block's largest weight becomes 4 instead of 6), bf16 scales from
the full range down to a share of it and then the ones next to the best, both signs where the grid is lopsided.
Errors may be weighted per input channel. Squares are summed in 16 lanes, and the lanes in halves: the
compiled kernel and plain torch add in the same order and find the same scale.

Settling makes quantization idempotent. A dequantized weight is rounded to its dtype, so the range
of a block no longer gives back exactly the scale that made it; when a neighbouring bf16 scale
represents the block without any error, that scale is taken. On data that was never quantized
this changes nothing.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from aqtx.formats import kernel
from aqtx.formats.elements import round_value
from aqtx.formats.scales import Affine, affine_of_range, affine_of_scale, snap_blocks
from aqtx.formats.table import Format

LANES = 16
NUM_STEPS = 16
# the least share of the full range that is tried, by bits: few levels clip deeply
LOWEST_SHARE = {2: 0.25, 3: 0.45, 4: 0.6}
# of more bits the next scales change a block's largest code, and `settle` could not tell where it came from
FINE_BITS = 4
NUM_PROBED = 2


def least_error(
    blocks: Tensor,
    candidates: Affine,
    fmt: Format,
    dtype: torch.dtype,
    importance: Tensor | None,
    *,
    both_signs: bool = False,
) -> Tensor:
    """Index [..., G] of the candidate [C, ..., G] of least squared error, the first one among equals.

    Errors are between blocks [..., G, B] and their values as `dtype` holds them, weighted by `importance` [G, B].
    With `both_signs` each candidate is tried with its negative scale too, which has C more as index.
    """
    runs = _in_lanes(blocks.reshape(-1, blocks.shape[-1]))
    weights = torch.ones_like(runs[:1]) if importance is None else _in_lanes(importance)
    flat = Affine(*(None if part is None else part.reshape(len(part), -1).contiguous() for part in candidates))  # type: ignore[arg-type]
    if kernel.serves(blocks.device) and dtype in (torch.float32, torch.bfloat16):
        best = kernel.best_scales(runs, weights, flat, fmt, to_bf16=dtype is torch.bfloat16, both_signs=both_signs)
    else:
        flat = Affine(torch.cat([flat.scale, -flat.scale])) if both_signs else flat
        best = _best_scales(runs, weights, flat, fmt, dtype)
    return best.view(blocks.shape[:-1])


def _best_scales(runs: Tensor, weights: Tensor, candidates: Affine, fmt: Format, dtype: torch.dtype) -> Tensor:
    """In plain torch, one candidate of all runs at a time; the last bit of a quotient does not matter here."""
    weights = weights.repeat(len(runs) // len(weights), 1)
    best, least = torch.zeros(len(runs), dtype=torch.long, device=runs.device), None
    for index, scale in enumerate(candidates.scale.unsqueeze(-1)):
        zero_point = None if candidates.zero_point is None else candidates.zero_point[index].unsqueeze(-1)
        values = round_value(runs * (1 / scale), fmt.element, zero_point).mul_(scale).to(dtype).float()
        error = _lane_sum((values - runs).square_().mul_(weights))
        better = torch.ones_like(best, dtype=torch.bool) if least is None else error < least
        best, least = torch.where(better, index, best), error if least is None else torch.where(better, error, least)
    return best


def _in_lanes(x: Tensor) -> Tensor:
    """[R, B] padded with zeros to whole lanes."""
    missing = -x.shape[-1] % LANES
    return (pad(x, (0, missing)) if missing else x).contiguous()


def _lane_sum(x: Tensor) -> Tensor:
    """Sums [R] of [R, B], in the kernel's order."""
    parts = x.unflatten(-1, (-1, LANES))
    total = parts[:, 0]
    for at in range(1, parts.shape[1]):
        total = total + parts[:, at]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def search_real(
    blocks: Tensor, bounds: tuple[Tensor, Tensor], fmt: Format, dtype: torch.dtype, importance: Tensor | None = None
) -> Affine:
    """The scale of least squared error among shares of the full range, then among those next to the best one."""
    lowest = LOWEST_SHARE.get(fmt.element.bits, 0.75)
    steps = [1 - (1 - lowest) * step / NUM_STEPS for step in range(NUM_STEPS + 1)]
    shares = torch.tensor(steps, device=blocks.device).view(-1, *[1] * bounds[0].dim())
    candidates = affine_of_range((bounds[0] * shares, bounds[1] * shares), fmt)
    # codes reach -2^(b-1) but only 2^(b-1) - 1: a negative scale gives the long side to positive weights
    best = _best_of(blocks, candidates, fmt, dtype, importance, both_signs=_is_lopsided(fmt))
    if fmt.element.bits <= FINE_BITS:
        best = _best_of(blocks, _around(best, fmt), fmt, dtype, importance)
    return best if importance is not None else settle(blocks, bounds, best, fmt, dtype)


def _best_of(
    blocks: Tensor,
    candidates: Affine,
    fmt: Format,
    dtype: torch.dtype,
    importance: Tensor | None,
    *,
    both_signs: bool = False,
) -> Affine:
    """The best of candidates [C, ..., G], block by block."""
    best = least_error(blocks, candidates, fmt, dtype, importance, both_signs=both_signs).unsqueeze(0)
    at = best % len(candidates.scale)
    found = Affine(*(None if part is None else part.gather(0, at)[0] for part in candidates))  # type: ignore[arg-type]
    return found._replace(scale=torch.where(best[0] < len(candidates.scale), found.scale, -found.scale))


def _around(best: Affine, fmt: Format) -> Affine:
    """A scale, the bf16 scales next to it, and the same scale with the zero points next to its own."""
    near = _beside(best.scale, (0, 1, -1, 2, -2))
    usable = torch.where(near.isfinite() & (near != 0), near, best.scale)
    if best.zero_point is None:
        return Affine(usable)
    zeros = torch.stack([best.zero_point + step for step in (*[0] * len(near), 1, -1)])
    return Affine(
        torch.cat([usable, best.scale.expand(2, *best.scale.shape)]), zeros.clamp_(0, 2**fmt.element.bits - 1)
    )


def _beside(scale: Tensor, steps: tuple[int, ...]) -> Tensor:
    """bf16 scales so many steps beside some [..., G]: float32 [C, ..., G]."""
    bits = scale.to(torch.bfloat16).view(torch.int16)
    return torch.stack([bits + step for step in steps]).view(torch.bfloat16).float()


def settle(blocks: Tensor, bounds: tuple[Tensor, Tensor], first: Affine, fmt: Format, dtype: torch.dtype) -> Affine:
    """`first`, except where a neighbouring scale represents a block exactly and `first` does not."""
    neighbours = _could_have_made(bounds, fmt)
    probed = _is_exact(blocks[..., :NUM_PROBED], neighbours, fmt, dtype)  # [C, ..., G]
    for index in probed.flatten(1).any(1).nonzero().flatten().tolist():
        some = probed[index]  # few of many
        one, now = (_take(part, some) for part in (_take(neighbours, index), first))
        exact = _is_exact(blocks[some], one, fmt, dtype) & ~_is_exact(blocks[some], now, fmt, dtype)
        some = some.masked_scatter(some, exact)
        first = _select(some, _take(neighbours, index), first)
    return first


def _take(affine: Affine, place: int | Tensor) -> Affine:
    return Affine(*(None if part is None else part[place] for part in affine))  # type: ignore[arg-type]


def _is_lopsided(fmt: Format) -> bool:
    return not fmt.asymmetric and not fmt.element.is_float


def _could_have_made(bounds: tuple[Tensor, Tensor], fmt: Format) -> Affine:
    """The scales [C, ..., G] that can have left a dequantized block with these bounds, and those next to each."""
    low, high = bounds
    scales = [affine_of_range(bounds, fmt).scale]
    if fmt.asymmetric:  # data that spans one or two codes less, as rounding of both ends may leave it
        steps = 2**fmt.element.bits - 1
        scales += [affine_of_scale((high - low) / (steps - less), low, fmt).scale for less in (1, 2)]
    both_signs = _is_lopsided(fmt) and fmt.rule == "search"
    if both_signs:
        scales.append(affine_of_scale(high / 2 ** (fmt.element.bits - 1), low, fmt).scale)
    found = affine_of_scale(_beside(torch.stack(scales), (0, 1, -1)).transpose(0, 1).flatten(0, 1), low, fmt)
    return Affine(torch.cat([found.scale, -found.scale])) if both_signs else found


def _is_exact(blocks: Tensor, affine: Affine, fmt: Format, dtype: torch.dtype) -> Tensor:
    return (snap_blocks(blocks, affine, fmt, dtype).to(dtype).float() == blocks).all(-1)


def _select(mask: Tensor, yes: Affine, no: Affine) -> Affine:
    scale = torch.where(mask, yes.scale, no.scale)
    if yes.zero_point is None or no.zero_point is None:
        return Affine(scale)
    return Affine(scale, torch.where(mask, yes.zero_point, no.zero_point))
