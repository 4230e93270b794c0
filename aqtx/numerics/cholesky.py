"""Triangular factor of damped Hessians, with a stated schedule for those that are not positive definite.

GPTQ needs, for each column, how the error of the columns rounded before it should be made good.
With `H = R R^T`, R upper triangular, the output error of a row's difference `d = w - q` is
`|d R|^2`, and component c of `d R` involves the columns up to c only. Rounding column c to the value
nearest to `w_c + sum_{i<c} d_i R[i, c] / R[c, c]` is therefore GPTQ's greedy choice, and no inverse
of H is ever formed: a quarter of the arithmetic of the usual factor of the inverse, better conditioned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.numerics.products import add_product

RETRY_FACTOR = 10.0
FIRST_RETRY = 1e-4  # damping fraction tried next where none was asked for
LAST_RETRY = 10.0  # a positive semi-definite matrix factors long before this
PANEL = 128  # columns of R found together


@dataclass(frozen=True)
class Factor:
    """Columns of R over their diagonal (above it only), that diagonal, and the damping that it took.

    ratios: [E, K, K]; diagonal: [E, K]; damping: [E], of the mean of H's diagonal; shift: [E], what was added to it.
    """

    ratios: Tensor
    diagonal: Tensor
    damping: Tensor
    shift: Tensor


def factor(H: Tensor, damp_fraction: float, order: Tensor | None = None) -> Factor:
    """Factor each `H + damping * mean(diag(H)) I` of a batch [E, K, K], rows and columns in `order` [E, K].

    A matrix that fails is tried again with ten times the damping (from 1e-4 where none was asked
    for) until 10 times the mean of its diagonal is reached. A matrix of zeros counts as the identity.

    Raises:
        InputError: a matrix is still not positive definite at the end of the schedule.
    """
    mean = H.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    empty = H.diagonal(dim1=-2, dim2=-1).amax(-1) <= 0
    damping = torch.full_like(mean, damp_fraction)
    R, failed = _attempt(_ordered(H, order), (damping + empty) * mean)
    while failed.any():
        if bool((damping[failed] >= LAST_RETRY).any()):
            worst = failed.nonzero().flatten().tolist()
            raise InputError(f"the Hessians of batch entries {worst} are not positive semi-definite")
        damping[failed] = (damping[failed] * RETRY_FACTOR).clamp(FIRST_RETRY, LAST_RETRY)
        own = None if order is None else order[failed]
        again, still = _attempt(_ordered(H[failed], own), (damping * mean)[failed])
        R[failed] = again
        failed = failed.masked_scatter(failed, still)
    diagonal = R.diagonal(dim1=-2, dim2=-1).clone()
    return Factor(R.div_(diagonal.unsqueeze(-2)), diagonal, damping, (damping + empty) * mean)


def _ordered(H: Tensor, order: Tensor | None) -> Tensor:
    """A copy of H with rows and columns in order."""
    if order is None:
        return H.clone()
    out, rows = torch.empty_like(H), torch.empty_like(H[0])
    for one, columns, to in zip(H, order, out, strict=True):
        torch.index_select(one, 0, columns, out=rows)
        torch.index_select(rows, 1, columns, out=to)
    return out


def _attempt(R: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """R in the place of the matrices once damped, their values left below its diagonal, and which of them failed.

    Panels of columns from the last to the first: a panel of H less what the later columns of R explain is
    R's panel times its corner, and the corner is the Cholesky factor of its own rows, read backwards.
    """
    R.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
    failed = torch.zeros(len(R), dtype=torch.bool, device=R.device)
    for low in reversed(range(0, R.shape[-1], PANEL)):
        own = slice(low, low + PANEL)
        panel, later = R[:, : low + PANEL, own], R[:, :, low + PANEL :]
        if later.shape[-1]:
            for to, left, right in zip(panel, later[:, : low + PANEL], later[:, own], strict=True):
                add_product(to, left, right.t(), alpha=-1)
        lower, info = torch.linalg.cholesky_ex(panel[:, low:].flip(-2, -1))
        corner = lower.flip(-2, -1)
        panel[:, low:] = corner
        if low:
            panel[:, :low] = torch.linalg.solve_triangular(corner.mT, panel[:, :low], upper=False, left=False)
        failed |= (info != 0) | ~corner.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    return R, failed
