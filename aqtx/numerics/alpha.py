"""PL_Alpha_Hill: how heavy the tail of a weight matrix's spectrum is.

Low alpha means a heavy tail: a few directions carry far more than chance would give them, which heavy-tailed
self-regularisation theory reads as a well-trained matrix. Alphas of the full spectrum depend on the matrix's
aspect ratio even for pure noise (6.4 square, 9.8 at 1:3.5), so only FARMS alphas are comparable between shapes;
the full one has more invariances: alpha(W) = alpha(W^T) = alpha(c W) = alpha(U W V) for orthogonal U and V.

A matrix without a usable spectrum (fewer than two eigenvalues, zeros, all eigenvalues equal, not finite) has alpha NaN
and a reason, a sentence. It is never sorted among the others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.errors import InputError, nearest
from aqtx.numerics.spectrum import eigenvalues, farms_blocks
from aqtx.numerics.tail import RULES, hill, tail_size

SPECTRA = ("full", "farms")
# A float32 Gram matrix is exact to 1e-7 of its largest eigenvalue. With the threshold above 1e-4 of it, alpha
# stays within 1e-4 (measured, spiked spectra); below, the singular values decide.
GRAM_FLOOR = 1e-4


@dataclass(frozen=True)
class AlphaStats:
    """Alpha of each matrix of a batch, in order, and how it came about. A single matrix is a batch of one."""

    alpha: Tensor  # [E] float64, NaN where degenerate
    k_used: list[int]
    num_eigenvalues: list[int]
    method: list[str]  # e.g. "farms/k_fraction/gram"
    reason: list[str | None]  # why the matrix is degenerate


@dataclass(frozen=True)
class _One:
    alpha: float
    k: int
    count: int
    path: str
    reason: str | None = None


def check_options(spectra: str, threshold: str, k_fraction: float) -> list[str]:
    """What is wrong with a choice of variant, in sentences."""
    problems = []
    if spectra not in SPECTRA:
        problems.append(f"spectra {spectra!r} is none of {', '.join(SPECTRA)}{nearest(spectra, SPECTRA)}.")
    if threshold not in RULES:
        problems.append(f"threshold {threshold!r} is none of {', '.join(RULES)}{nearest(threshold, RULES)}.")
    if not 0 < k_fraction < 1:
        problems.append(f"k_fraction {k_fraction} is not between 0 and 1.")
    return problems


def analyze(
    W: Tensor,
    *,
    k_fraction: float = 0.1,
    spectra: str = "full",
    threshold: str = "k_fraction",
    precise: bool = False,
) -> AlphaStats:
    """Alpha of W [N, K] or of each matrix of W [E, N, K].

    `precise` computes singular values in float64 throughout; the default uses float32 Gram matrices where they suffice.
    """
    problems = check_options(spectra, threshold, k_fraction)
    if W.ndim not in (2, 3):
        problems.append(f"alpha is of a matrix [N, K] or a batch [E, N, K], not of shape {list(W.shape)}.")
    if problems:
        raise InputError(*problems)
    stack = (W if W.ndim == 3 else W[None]).detach()
    ones = [_analyze_one(w, spectra, threshold, k_fraction, precise) for w in stack]
    return AlphaStats(
        alpha=torch.tensor([one.alpha for one in ones], dtype=torch.float64),
        k_used=[one.k for one in ones],
        num_eigenvalues=[one.count for one in ones],
        method=[f"{spectra}/{threshold}/{one.path}" for one in ones],
        reason=[one.reason for one in ones],
    )


def alpha_hill(W: Tensor, k_fraction: float = 0.1, spectra: str = "full") -> float | Tensor:
    """Alpha of W [N, K] as a float, or of each matrix of W [E, N, K] as a tensor [E]; NaN where degenerate."""
    alpha = analyze(W, k_fraction=k_fraction, spectra=spectra).alpha
    return alpha if W.ndim == 3 else float(alpha[0])


def _analyze_one(W: Tensor, spectra: str, threshold: str, k_fraction: float, precise: bool) -> _One:
    if W.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(W))).all()):  # NaN spreads to both ends
        return _One(float("nan"), 0, 0, "none", "the weights contain NaN or infinity")
    if min(W.shape) < 2:
        return _One(float("nan"), 0, min(W.shape), "none", "fewer than two eigenvalues")
    source = farms_blocks(W) if spectra == "farms" else W
    for exact in (True,) if precise else (False, True):
        lam = eigenvalues(source, precise=exact)
        k = tail_size(lam, threshold, k_fraction)
        if exact or lam[-k - 1] >= GRAM_FLOOR * lam[-1] > 0:
            break
    reason = _degenerate(lam, k)
    alpha = float("nan") if reason else hill(lam, k, threshold)
    return _One(alpha, k, lam.numel(), "svd" if exact else "gram", reason)


def _degenerate(lam: Tensor, k: int) -> str | None:
    if float(lam[-1]) == 0:
        return "all weights are zero"
    # A spread of 1e-6 in singular values is rounding: an orthogonal matrix has no tail to measure.
    if float(lam[-1]) <= float(lam[-k - 1]) * (1 + 1e-6):
        return "the largest eigenvalues are all equal"
    return None
