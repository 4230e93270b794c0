"""Eigenvalues of W W^T: one spectrum per matrix, or the pooled spectra of fixed-size blocks (FARMS).

Two ways lead to the eigenvalues `lam = sigma(W)^2`. The singular values in float64 are the reference and cost
about 0.7 s for 1024 x 2048. The Gram matrix of the smaller side in float32 takes a seventh of that, but squares
the condition number: its absolute error is about 1e-7 of the largest eigenvalue, so the small end of the
spectrum is noise. The tail that alpha looks at is the large end, and `aqtx.numerics.alpha` returns to the
singular values where the tail reaches too deep.

FARMS (arXiv 2506.06280) cuts W into blocks of one aspect ratio, so that matrices of different shapes become comparable:
the spectrum of pure noise depends on the aspect ratio alone, and so does the alpha read from it.

Legend: N output rows, K input columns, r = min(N, K), b block side, B number of blocks.
"""

import torch
from torch import Tensor

FARMS_SIDE = 128
FARMS_MAX_BLOCKS = 256
LARGE = 256  # from here on it pays to save multiplications and to change libraries


def farms_blocks(W: Tensor, side: int = FARMS_SIDE, max_blocks: int = FARMS_MAX_BLOCKS) -> Tensor:
    """Square blocks of W [N, K] side by side, [B, b, b]; evenly spaced ones where there are more than `max_blocks`."""
    num_rows, num_columns = W.shape
    b = min(side, num_rows, num_columns)
    down, across = num_rows // b, num_columns // b  # what is left over at the edges is not sampled
    count = min(down * across, max_blocks)
    picked = torch.arange(count, device=W.device) * (down * across) // count
    tiles = W[: down * b, : across * b].reshape(down, b, across, b).transpose(1, 2)
    return tiles[picked // across, picked % across]


def eigenvalues(W: Tensor, *, precise: bool) -> Tensor:
    """All r eigenvalues of W W^T for W [..., N, K], pooled over the leading dimensions; float64, ascending."""
    if precise:
        lam: Tensor = torch.linalg.svdvals(W.double()).square()
        return lam.flatten().sort().values
    # Scaled to 1 first: float32 squares would overflow from 1e19 on and vanish below 1e-23.
    W = W.float()
    peak = W.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    lam = _symmetric_eigenvalues(_gram(W / peak)).clamp_min(0).double() * peak.double().square()
    return lam.flatten().sort().values


def _symmetric_eigenvalues(G: Tensor) -> Tensor:
    """Eigenvalues of a symmetric G [..., r, r] given by its lower triangle; G is used up."""
    if G.ndim > 2 or G.device.type != "cpu" or len(G) < LARGE:
        found: Tensor = torch.linalg.eigvalsh(G)
        return found
    from scipy.linalg import eigh

    # scipy's LAPACK takes 3/4 of the time of torch's; the transposed view is what LAPACK calls the upper triangle
    values = eigh(G.numpy().T, lower=False, eigvals_only=True, overwrite_a=True, check_finite=False, driver="evd")
    return torch.from_numpy(values)


def _gram(W: Tensor) -> Tensor:
    """The Gram matrix of the smaller side; of large ones the lower triangle in eighths, 9/16 of the multiplications."""
    W = W.mT if W.shape[-2] > W.shape[-1] else W
    r = W.shape[-2]
    if W.ndim > 2 or r < LARGE:
        return W @ W.mT
    G = W.new_zeros(r, r)
    eighth = -(-r // 8)
    for start in range(0, r, eighth):
        rows = slice(start, min(start + eighth, r))
        torch.mm(W[rows], W[: rows.stop].mT, out=G[rows, : rows.stop])
    return G
