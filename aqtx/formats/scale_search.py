"""Real scales beyond the plain rule: the search for least squared error, and settling.

Settling makes quantization idempotent. A dequantized weight is rounded to its dtype, so the range
of a block no longer gives back exactly the scale that made it; when a neighbouring bf16 scale
represents the block without any error, that scale is taken. On data that was never quantized
this changes nothing.
"""

import torch
from torch import Tensor

from aqtx.formats.scales import Affine, affine_of_range, affine_of_scale, snap_blocks, squared_error
from aqtx.formats.table import Format

NUM_STEPS = 24
# the least share of the full range that is tried, by bits: few levels clip deeply
LOWEST_SHARE = {2: 0.25, 3: 0.45, 4: 0.6}
NUM_PROBED = 4


def search_real(blocks: Tensor, bounds: tuple[Tensor, Tensor], fmt: Format, dtype: torch.dtype) -> Affine:
    """The scale of least squared error among shares of the full range, both signs where the grid is lopsided."""
    best = affine_of_range(bounds, fmt)
    error = squared_error(blocks, best, fmt, dtype)
    lowest = LOWEST_SHARE.get(fmt.element.bits, 0.75)
    shares = [1 - (1 - lowest) * step / NUM_STEPS for step in range(1, NUM_STEPS + 1)]
    candidates = [_shrunk(bounds, share, fmt) for share in shares]
    if _is_lopsided(fmt):
        # codes reach -2^(b-1) but only 2^(b-1) - 1: a negative scale gives the long side to positive weights
        candidates += [Affine(-candidate.scale) for candidate in (best, *candidates)]
    for candidate in candidates:
        best, error = _better(blocks, best, error, candidate, fmt, dtype)
    return settle(blocks, bounds, best, fmt, dtype)


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
    return (snap_blocks(blocks, affine, fmt).to(dtype).float() == blocks).all(-1)


def _better(
    blocks: Tensor, best: Affine, error: Tensor, candidate: Affine, fmt: Format, dtype: torch.dtype
) -> tuple[Affine, Tensor]:
    tried = squared_error(blocks, candidate, fmt, dtype)
    better = tried < error
    return _select(better, candidate, best), torch.where(better, tried, error)


def _select(mask: Tensor, yes: Affine, no: Affine) -> Affine:
    scale = torch.where(mask, yes.scale, no.scale)
    if yes.zero_point is None or no.zero_point is None:
        return Affine(scale)
    return Affine(scale, torch.where(mask, yes.zero_point, no.zero_point))
