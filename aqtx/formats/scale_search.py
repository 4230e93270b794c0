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
from aqtx.formats.scales import Affine, affine_of_range, affine_of_scale, snap_blocks
from aqtx.formats.table import Format

LANES = 16
NUM_STEPS = 16
# the least share of the full range that is tried, by bits: few levels clip deeply
LOWEST_SHARE = {2: 0.25, 3: 0.45, 4: 0.6}
# of more bits the next scales change a block's largest code, and `settle` could not tell where it came from
FINE_BITS = 4
NUM_PROBED = 4


def least_error(
    blocks: Tensor, candidates: Affine, fmt: Format, dtype: torch.dtype, importance: Tensor | None
) -> Tensor:
    """Index [..., G] of the candidate [C, ..., G] of least squared error, the first one among equals.

    Errors are between blocks [..., G, B] and their values as `dtype` holds them, weighted by `importance` [G, B].
    """
    runs = _in_lanes(blocks.reshape(-1, blocks.shape[-1]))
    weights = torch.ones_like(runs[:1]) if importance is None else _in_lanes(importance)
    flat = Affine(*(None if part is None else part.reshape(len(part), -1).contiguous() for part in candidates))  # type: ignore[arg-type]
    compiled = kernel.serves(blocks.device) and dtype in (torch.float32, torch.bfloat16)
    best = (kernel.best_scales if compiled else _best_scales)(runs, weights, flat, fmt, dtype)
    return best.view(blocks.shape[:-1])


def _best_scales(runs: Tensor, weights: Tensor, candidates: Affine, fmt: Format, dtype: torch.dtype) -> Tensor:
    """In plain torch, one candidate of all runs at a time."""
    weights = weights.repeat(len(runs) // len(weights), 1)
    best, least = torch.zeros(len(runs), dtype=torch.long, device=runs.device), None
    for index, scale in enumerate(candidates.scale):
        zero_point = None if candidates.zero_point is None else candidates.zero_point[index]
        values = snap_blocks(runs, Affine(scale, zero_point), fmt).to(dtype).float()
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
    shares = [1 - (1 - lowest) * step / NUM_STEPS for step in range(NUM_STEPS + 1)]
    candidates = [_shrunk(bounds, share, fmt) for share in shares]
    if _is_lopsided(fmt):
        # codes reach -2^(b-1) but only 2^(b-1) - 1: a negative scale gives the long side to positive weights
        candidates += [Affine(-candidate.scale) for candidate in candidates]
    best = _best_of(blocks, candidates, fmt, dtype, importance)
    if fmt.element.bits <= FINE_BITS:
        best = _best_of(blocks, [best, *_around(best, fmt)], fmt, dtype, importance)
    return settle(blocks, bounds, best, fmt, dtype)


def _best_of(
    blocks: Tensor, candidates: list[Affine], fmt: Format, dtype: torch.dtype, importance: Tensor | None
) -> Affine:
    """The best of candidates [..., G], block by block."""
    scale = torch.stack([candidate.scale for candidate in candidates])
    zeros = [candidate.zero_point for candidate in candidates if candidate.zero_point is not None]
    stacked = Affine(scale, torch.stack(zeros) if zeros else None)
    best = least_error(blocks, stacked, fmt, dtype, importance).unsqueeze(0)
    return Affine(*(None if part is None else part.gather(0, best)[0] for part in stacked))  # type: ignore[arg-type]


def _around(best: Affine, fmt: Format) -> list[Affine]:
    """The bf16 scales next to one, and the same scale with the zero points next to its own."""
    bits = best.scale.to(torch.bfloat16).view(torch.int16)
    near = [(bits + step).view(torch.bfloat16).float() for step in (1, -1, 2, -2)]
    usable = [torch.where(scale.isfinite() & (scale != 0), scale, best.scale) for scale in near]
    found = [Affine(scale, best.zero_point) for scale in usable]
    if best.zero_point is not None:
        most = 2**fmt.element.bits - 1
        found += [Affine(best.scale, (best.zero_point + step).clamp(0, most)) for step in (1, -1)]
    return found


def settle(blocks: Tensor, bounds: tuple[Tensor, Tensor], first: Affine, fmt: Format, dtype: torch.dtype) -> Affine:
    """`first`, except where a neighbouring scale represents a block exactly and `first` does not."""
    for neighbour in _could_have_made(bounds, fmt):
        exact = _is_exact(blocks[..., :NUM_PROBED], neighbour, fmt, dtype)
        if not bool(exact.any()):
            continue
        exact = exact & _is_exact(blocks, neighbour, fmt, dtype) & ~_is_exact(blocks, first, fmt, dtype)
        first = _select(exact, neighbour, first)
    return first


def _is_lopsided(fmt: Format) -> bool:
    return not fmt.asymmetric and not fmt.element.is_float


def _could_have_made(bounds: tuple[Tensor, Tensor], fmt: Format) -> list[Affine]:
    """The scales that can have left a dequantized block with these bounds."""
    full = affine_of_range(bounds, fmt)
    found = [full, *_neighbours(full, bounds, fmt), *_shorter(bounds, fmt)]
    if _is_lopsided(fmt) and fmt.rule == "search":
        longer = affine_of_scale(bounds[1] / 2 ** (fmt.element.bits - 1), bounds[0], fmt)
        found += [longer, *_neighbours(longer, bounds, fmt)]
        found += [Affine(-affine.scale) for affine in found]
    return found


def _shrunk(bounds: tuple[Tensor, Tensor], share: float, fmt: Format) -> Affine:
    return affine_of_range((bounds[0] * share, bounds[1] * share), fmt)


def _neighbours(affine: Affine, bounds: tuple[Tensor, Tensor], fmt: Format) -> list[Affine]:
    """The next bf16 scales above and below."""
    bits = affine.scale.to(torch.bfloat16).view(torch.int16)
    return [affine_of_scale((bits + step).view(torch.bfloat16).float(), bounds[0], fmt) for step in (1, -1)]


def _shorter(bounds: tuple[Tensor, Tensor], fmt: Format) -> list[Affine]:
    """Scales for asymmetric data that spans one or two codes less, as rounding of both ends may leave it."""
    if not fmt.asymmetric:
        return []
    steps = 2**fmt.element.bits - 1
    shorter = [affine_of_scale((bounds[1] - bounds[0]) / (steps - less), bounds[0], fmt) for less in (1, 2)]
    return [near for affine in shorter for near in (affine, *_neighbours(affine, bounds, fmt))]


def _is_exact(blocks: Tensor, affine: Affine, fmt: Format, dtype: torch.dtype) -> Tensor:
    return (snap_blocks(blocks, affine, fmt, dtype).to(dtype).float() == blocks).all(-1)


def _select(mask: Tensor, yes: Affine, no: Affine) -> Affine:
    scale = torch.where(mask, yes.scale, no.scale)
    if yes.zero_point is None or no.zero_point is None:
        return Affine(scale)
    return Affine(scale, torch.where(mask, yes.zero_point, no.zero_point))
