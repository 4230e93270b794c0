"""Which rows GPTQ made better than round-to-nearest, on the Hessian given, and by how much.

Legend: E experts, N rows, K columns; D [E, N, K] are differences, weights less rounded weights; the
output error of a row is d H d^T. Evaluating it takes N K^2 multiplications, as much as GPTQ itself, and
twice that for both candidates. A proof is cheaper: GPTQ's own sum of squares bounds its error from above
for nothing, and from S, the m columns of H with the largest diagonal,

    d H d^T >= |d B|^2,    B = H[:, S] L^-T,    L L^T = H[S, S],

bounds the other's from below (the Schur complement of H[S, S] is positive semi-definite). Only rows that
the bounds leave open are evaluated.
"""

import torch
from torch import Tensor

BOUND_SHARE = 8  # m = K / 8
JITTER = 1e-3  # of the mean of diag(H[S, S]), added to it: the bound only becomes smaller
SLACK = 0.01  # of either bound, for float32


def row_errors(D: Tensor, H: Tensor, panel: int = 256) -> Tensor:
    """d H d^T of each row: D [E, N, K], H [E, K, K] -> [E, N]. H's symmetry halves the work."""
    total = D.new_zeros(D.shape[:-1])
    for low in range(0, D.shape[-1], panel):
        own, later = D[..., low : low + panel], D[..., low + panel :]
        products = own @ H[:, low : low + panel, low : low + panel]
        if later.shape[-1]:
            products.baddbmm_(later, H[:, low + panel :, low : low + panel], alpha=2)
        total += torch.linalg.vecdot(products, own)
    return total


def bound_basis(H: Tensor) -> Tensor:
    """B^T [E, m, K] of the bound from below; zeros where H[S, S] cannot be factored."""
    count = max(H.shape[-1] // BOUND_SHARE, 1)
    chosen = H.diagonal(dim1=-2, dim2=-1).topk(count, -1).indices
    columns = torch.stack([one[places] for one, places in zip(H, chosen, strict=True)])  # [E, m, K]
    corner = columns.gather(-1, chosen.unsqueeze(1).expand(-1, count, -1))
    diagonal = corner.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(JITTER * diagonal.mean(-1, keepdim=True))
    lower, failed = torch.linalg.cholesky_ex(corner)
    basis = torch.linalg.solve_triangular(lower, columns, upper=False)
    return torch.where((failed == 0)[:, None, None] & basis.isfinite(), basis, 0.0)


def better_rows(D: Tensor, nearest: Tensor, H: Tensor, *, basis: Tensor, bound: Tensor | None) -> Tensor:
    """Rows [E, N] where D has a smaller error than `nearest`.

    `basis` is that of `bound_basis`; `bound` [E, N] is at least D's errors, None where such is not known.
    """
    if bound is None:
        return row_errors(D, H) < row_errors(nearest, H)
    proven = (1 - SLACK) * (nearest @ basis.transpose(-1, -2)).square_().sum(-1)
    better = bound < proven
    for expert, known in enumerate(better):
        left = (~known).nonzero().flatten()
        if len(left):
            own = H[expert : expert + 1]
            errors = row_errors(D[expert, left].unsqueeze(0), own)[0]
            known[left] = errors < proven[expert, left]
            still = (~known[left]).nonzero().flatten()
            if len(still):
                known[left[still]] = errors[still] < row_errors(nearest[expert, left[still]].unsqueeze(0), own)[0]
    return better
