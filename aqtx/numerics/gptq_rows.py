"""Which rows GPTQ made better than round-to-nearest, on the Hessian given, and by how much.

Legend: E experts, N rows, K columns; a difference d [K] is a row of the weight less its rounded values; the
output error of a row is d H d^T. Evaluating it takes N K^2 multiplications, as much as GPTQ itself, and
twice that for both candidates. A proof is cheaper: GPTQ's own sum of squares bounds its error from above
for nothing, and from S, the m columns of H with the largest diagonal,

    d H d^T >= |d B|^2,    B = H[:, S] L^-T,    L L^T = H[S, S],

bounds the other's from below (the Schur complement of H[S, S] is positive semi-definite); it grows with every
column of S. Only rows that the bounds leave open are evaluated. Both hold in exact arithmetic; SLACK is for float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.formats.codec import all_finite

BOUND_SHARE = 8  # m = K / 8
JITTER = 1e-3  # of the mean of diag(H[S, S]), added to it: the bound only becomes smaller
SLACK = 0.01  # of either bound, for float32


@dataclass(frozen=True)
class Differences:
    """Of all rows, columns first and in the order they were rounded in: [E, K, N]."""

    columns: Tensor
    order: Tensor | None  # [E, K] column of the weight at each place

    def rows(self, expert: int, chosen: slice | Tensor) -> Tensor:
        """Some rows [n, K] of one expert, in the weight's own order."""
        columns = self.columns[expert]
        taken = columns[:, chosen] if isinstance(chosen, slice) else columns.index_select(1, chosen)
        return (taken if self.order is None else taken[self.order[expert].argsort()]).t().contiguous()


def row_errors(D: Tensor, H: Tensor, panel: int = 128) -> Tensor:
    """d H d^T of each row: D [.., N, K], H [.., K, K] -> [.., N]. H's symmetry halves the work."""
    total = D.new_zeros(D.shape[:-1])
    for low in range(0, D.shape[-1], panel):
        own, later = D[..., low : low + panel], D[..., low + panel :]
        products = own @ H[..., low : low + panel, low : low + panel]
        if later.shape[-1]:
            products.add_(later @ H[..., low + panel :, low : low + panel], alpha=2)
        total += torch.linalg.vecdot(products, own)
    return total


def bound_basis(H: Tensor, order: Tensor | None) -> Tensor:
    """B^T [E, m, K] of the bound from below, columns in `order`; zeros for experts whose H[S, S] cannot be factored."""
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
    return basis if order is None else basis.gather(-1, order.unsqueeze(1).expand_as(basis))


def _bounds_below(basis: Tensor, columns: Tensor, bound: Tensor) -> Tensor:
    """The bounds [E, N] from below: of a quarter of S, and of all of S for rows where that does not exceed `bound`."""
    proven = torch.empty_like(bound)
    first = -(-basis.shape[1] // 4)
    for below, B, D, above in zip(proven, basis, columns, bound, strict=True):
        torch.sum((B[:first] @ D).square_(), 0, out=below)
        left = (above >= (1 - SLACK) * below).nonzero().flatten()
        below[left] += (B[first:] @ D.index_select(1, left)).square_().sum(0)
    return proven.mul_(1 - SLACK)


def better_rows(
    D: Differences, nearest: Differences, H: Tensor, *, basis: Tensor, bound: Tensor | None, tight: bool
) -> Tensor:
    """Rows [E, N] where D has a smaller error than `nearest`.

    `basis` is that of `bound_basis`; `bound` [E, N] is at least D's errors, None where such is not known, and
    hardly more than they are where it is `tight`.
    """
    if bound is None:
        every = slice(None)
        pairs = ([row_errors(x.rows(e, every), one) for x in (D, nearest)] for e, one in enumerate(H))
        return torch.stack([ours < theirs for ours, theirs in pairs])
    proven = _bounds_below(basis, nearest.columns, bound)
    better = bound < proven
    for expert, known in enumerate(better):
        left = (~known).nonzero().flatten()
        if not len(left):
            continue
        # one side is evaluated and held against the other's bound; where that leaves rows open, the other side too
        if tight:
            theirs = row_errors(nearest.rows(expert, left), H[expert])
            still = ~(bound[expert, left] < theirs)  # NaN proves nothing
            known[left] = ~still
            known[left[still]] = row_errors(D.rows(expert, left[still]), H[expert]) < theirs[still]
        else:
            ours = row_errors(D.rows(expert, left), H[expert])
            still = ~(ours < proven[expert, left])
            known[left] = ~still
            known[left[still]] = ours[still] < row_errors(nearest.rows(expert, left[still]), H[expert])
    return better
