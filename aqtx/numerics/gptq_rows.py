"""Which candidate for a row has the least error on the Hessian given.

Legend: N rows, K columns; a difference d [K] is a row of the weight less its rounded values; its error is d H d^T.
Evaluating that takes N K^2 multiplications for each candidate, as much as GPTQ itself. A proof is cheaper. What
GPTQ and the sweeps minimize, d T d^T, is known without more work; T is H, damping and prior, so that it bounds the
error from above, and where prior and damping are a multiple of the identity the rest is known too. From below, with S
the m columns of H of the largest diagonal,

    d H d^T >= |d B|^2,    B = H[:, S] L^-T,    L L^T = H[S, S],

bounds any difference (the Schur complement of H[S, S] is positive semi-definite); it grows with every column of S.
Only rows that the bounds leave open are evaluated. All hold in exact arithmetic; SLACK is for float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.formats.codec import all_finite
from aqtx.numerics.products import product

BOUND_SHARE = 8  # m = K / 8
JITTER = 1e-3  # of the mean of diag(H[S, S]), added to it: the bound only becomes smaller
SLACK = 0.01  # of either bound, for float32
WIDTH = 256  # columns of H that differences are multiplied by at once
STEP = 64  # rows that are evaluated are a multiple of it


@dataclass(frozen=True)
class Left:
    """What a candidate leaves of a matrix [N, K], and d T d^T [N] where that is known."""

    errors: Tensor
    objective: Tensor | None = None


def row_errors(D: Tensor, H: Tensor, panel: int = WIDTH) -> Tensor:
    """d H d^T of each row: D [.., N, K], H [.., K, K] -> [.., N]. H's symmetry halves the work."""
    if D.dim() > 2:
        return torch.stack([row_errors(d, h, panel) for d, h in zip(D, H.expand(len(D), -1, -1), strict=True)])
    total = D.new_zeros(D.shape[:-1])
    for low in range(0, D.shape[-1], panel):
        own, later = D[:, low : low + panel], D[:, low + panel :]
        products = product(own, H[low : low + panel, low : low + panel])
        if later.shape[-1]:
            products.add_(product(later, H[low + panel :, low : low + panel]), alpha=2)
        total += torch.linalg.vecdot(products, own)
    return total


def bound_basis(H: Tensor) -> Tensor:
    """B^T [E, m, K] of the bound from below; zeros for experts whose H[S, S] cannot be factored."""
    count = max(H.shape[-1] // BOUND_SHARE, 1)
    chosen = H.diagonal(dim1=-2, dim2=-1).topk(count, -1).indices
    columns = torch.stack([one[places] for one, places in zip(H, chosen, strict=True)])  # [E, m, K]
    corner = columns.gather(-1, chosen.unsqueeze(1).expand(-1, count, -1))
    diagonal = corner.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(JITTER * diagonal.mean(-1, keepdim=True))
    lower, failed = torch.linalg.cholesky_ex(corner)
    basis = torch.linalg.solve_triangular(lower, columns, upper=False)
    for one, bad in zip(basis, failed, strict=True):
        if bad or not all_finite(one):
            one.zero_()
    return basis


class Contest:
    """Candidates for the rows of one matrix; each is held between two bounds of its errors, [C, N]."""

    def __init__(self, candidates: Sequence[Left], H: Tensor, *, basis: Tensor, share: float | None) -> None:
        """`share` is how much of the identity T exceeds H by; None: by something else too."""
        self.candidates, self.H, self.basis = candidates, H, basis
        ours = [_bounds(one, share) for one in candidates]
        self.below, self.above = (torch.stack(part) for part in zip(*ours, strict=True))

    def best(self) -> Tensor:
        """The candidate of least error of each row [N]; the first one on equal errors."""
        simpler = range(len(self.candidates) - 1)
        self._bound(0)
        self._evaluate(len(simpler))  # the last one, which is mostly the best
        for index in simpler:
            self._bound(index)
        for index in reversed(simpler):
            self._evaluate(index)
        return torch.where(self._alive(), self.above, torch.inf).argmin(0)

    def _alive(self) -> Tensor:
        """Candidates that may still be the best; one is out when it cannot be less than another's most."""
        return self.below <= self.above.amin(0)

    def _open(self, index: int) -> Tensor:
        """Rows for which a candidate is one of several."""
        alive = self._alive()
        return (alive[index] & (alive.sum(0) > 1)).nonzero().flatten()

    def _bound(self, index: int) -> None:
        """Raise the bound from below where that may decide: by a quarter of S, then by all of it."""
        first, total = -(-self.basis.shape[0] // 4), self.below.new_zeros(self.below.shape[1])
        for part in (self.basis[:first], self.basis[first:]):
            rows = self._open(index)
            if len(rows) and len(part):
                taken = _some(self.candidates[index].errors, rows)
                total[rows] += product(taken, part.t()).square_().sum(1)[: len(rows)]
                self.below[index, rows] = torch.maximum(self.below[index, rows], (1 - SLACK) * total[rows])

    def _evaluate(self, index: int) -> None:
        """Both bounds of a candidate become its errors where it is one of several; what is no number is infinite."""
        rows = self._open(index)
        if len(rows):
            exact = row_errors(_some(self.candidates[index].errors, rows), self.H)[: len(rows)]
            self.below[index, rows] = self.above[index, rows] = exact.nan_to_num_(nan=torch.inf)


def _some(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x, the last one again up to a whole number of STEP: products of few shapes are compiled once."""
    if len(rows) == len(x):
        return x
    missing = -len(rows) % STEP
    return x[torch.cat([rows, rows[-1:].expand(missing)])]


def _bounds(one: Left, share: float | None) -> tuple[Tensor, Tensor]:
    """From below and from above [N]; what is no number proves nothing."""
    if one.objective is None:
        return one.errors.new_zeros(len(one.errors)), one.errors.new_full((len(one.errors),), torch.inf)
    rest = torch.linalg.vecdot(one.errors, one.errors).mul_(share or 0.0)
    below = (1 - SLACK) * one.objective - rest if share is not None else torch.zeros_like(rest)
    return below.nan_to_num_(nan=0.0), ((1 + SLACK) * one.objective - rest).nan_to_num_(nan=torch.inf)
