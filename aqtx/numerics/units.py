"""Powers of two that bring numbers of extreme size to where their squares fit into float32.

A factor of two is exact: what is solved in other units has the same answer, bit for bit. Numbers of ordinary size keep
the factor 1.
"""

import torch
from torch import Tensor

from aqtx.formats.scale_rules import stored_scale
from aqtx.formats.scales import Scales, decode_affine
from aqtx.formats.table import E8M0, Format

LARGEST_WEIGHT, LARGEST_MOMENT = 1e6, 1e12  # beyond these, and below their inverses, other units are taken

LARGEST_EXPONENT = 126  # 2^126 and 2^-126 are both normal in float32


def unit(largest: Tensor, bound: float) -> Tensor:
    """A float32 power of two per entry: about 1 / largest where that lies outside [1 / bound, bound], else 1."""
    magnitude = largest.to(torch.float64)
    exponent = -torch.frexp(magnitude).exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    extreme = (magnitude > 0) & ((magnitude > bound) | (magnitude < 1 / bound))
    return torch.where(extreme, torch.ldexp(torch.ones_like(magnitude), exponent), 1.0).to(torch.float32)


def unit_of_weights(W: Tensor) -> Tensor:
    """[E, 1, 1] for weights [E, N, K]; float16 has no numbers that need one."""
    if W.dtype is torch.float16:
        return torch.ones(len(W), 1, 1, device=W.device)
    return unit(torch.maximum(W.amax((-2, -1)), -W.amin((-2, -1))), LARGEST_WEIGHT)[:, None, None]


def unit_of_moments(H: Tensor, prior: Tensor | None) -> Tensor:
    """[E] for moments [E, K, K]; one for all where they share a prior."""
    found = unit(H.diagonal(dim1=-2, dim2=-1).amax(-1), LARGEST_MOMENT)
    return found if prior is None or prior.dim() == 3 else found.amin().expand_as(found)


def scales_times(scales: Scales, factor: Tensor, fmt: Format) -> Scales | None:
    """Stored scales of values `factor` [E, 1, 1], powers of two, times as large; None where they cannot be stored."""
    scale, zero_point, per_tensor, supers = scales
    if per_tensor is not None:
        per_tensor = per_tensor * factor
    elif supers is not None:
        supers = (supers.float() * factor).to(supers.dtype)
    elif fmt.scale is E8M0:
        wanted = decode_affine(scales, fmt).scale * factor
        scale = stored_scale(wanted, fmt, None)
    else:
        scale = (scale.float() * factor).to(scale.dtype)
    made = Scales(scale, zero_point, per_tensor, supers)
    before, after = decode_affine(scales, fmt), decode_affine(made, fmt)
    same = torch.equal(after.scale, before.scale * factor)
    if before.minimum is not None and after.minimum is not None:
        same = same and torch.equal(after.minimum, before.minimum * factor)
    return made if same else None
