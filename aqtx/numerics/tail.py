"""Where the tail of a spectrum begins, and the Hill estimate of its exponent.

A power law `p(lam) ~ lam^-alpha` above a threshold `lam_{r-k}` has the maximum-likelihood exponent

    alpha = 1 + k / sum_{i=1..k} ln(lam_{r-i+1} / lam_{r-k})

over the k eigenvalues above it. The rules differ only in how they choose k:

    k_fraction   k = max(10, floor(k_fraction * r))
    xmin_mid     k = floor(r / 2)
    xmin_peak    the threshold of least Kolmogorov-Smirnov distance near the peak of the histogram of
                 log10(lam): 100 bins, from 0.95 to 1.5 times the left edge of the highest
    ks           the threshold of least distance anywhere (as WeightWatcher's), at least 10 values in the tail

The distance compares the tail's empirical distribution with the fitted power law:
`D = max_i |1 - (lam_i / lam_{r-k})^(1 - alpha) - i / k|`.
"""

import torch
from torch import Tensor

RULES = ("k_fraction", "xmin_mid", "xmin_peak", "ks")
MIN_TAIL = 10
MIN_EIGENVALUE = 1e-12  # a denominator of zero (a rank-deficient matrix) is taken for this,
MIN_RELATIVE = 1e-6  # or, so that tiny weights keep their alpha, for this share of the largest where that is less
MAX_KS_THRESHOLDS = 1024  # evenly spaced in k beyond: a pooled spectrum of 16,384 values would need 10^8 powers
PEAK_BINS = 100


def hill(lam: Tensor, k: int) -> float:
    """The exponent over the k largest of the ascending spectrum `lam`."""
    logs = _floored(lam, k).log()
    tail = logs[1:].sum() - k * logs[0]
    return 1.0 + k / float(tail) if float(tail) > 0 else float("inf")


def _floored(lam: Tensor, k: int) -> Tensor:
    """The threshold and the k values above it, away from zero."""
    return lam[-k - 1 :].clamp_min(min(MIN_EIGENVALUE, MIN_RELATIVE * float(lam[-1])))


def tail_size(lam: Tensor, rule: str, k_fraction: float) -> int:
    """How many of the ascending eigenvalues `lam` belong to the tail, in [1, r-1]."""
    r = lam.numel()
    if rule == "k_fraction":
        k = max(MIN_TAIL, int(k_fraction * r))
    elif rule == "xmin_mid":
        k = r // 2
    else:
        candidates = _near_peak(lam) if rule == "xmin_peak" else torch.arange(min(MIN_TAIL, r - 1), r)
        k = _least_distance(lam, candidates)
    return min(max(k, 1), r - 1)


def _near_peak(lam: Tensor) -> Tensor:
    """The tail sizes whose threshold lies around the highest bin of the spectrum's histogram."""
    logs = _floored(lam, lam.numel() - 1).log10()
    low, high = float(logs[0]), float(logs[-1])
    counts = torch.histc(logs, PEAK_BINS, min=low, max=high)
    peak = 10 ** (low + (high - low) * int(counts.argmax()) / PEAK_BINS)
    inside = ((lam[:-1] >= 0.95 * peak) & (lam[:-1] <= 1.5 * peak)).nonzero().flatten()
    sizes = lam.numel() - 1 - inside
    return sizes.flip(0) if sizes.numel() else torch.tensor([lam.numel() // 2])


def _least_distance(lam: Tensor, candidates: Tensor) -> int:
    """The tail size of least Kolmogorov-Smirnov distance among the ascending candidates; the largest tail of equals."""
    if candidates.numel() > MAX_KS_THRESHOLDS:
        picked = torch.arange(MAX_KS_THRESHOLDS) * (candidates.numel() - 1) // (MAX_KS_THRESHOLDS - 1)
        candidates = candidates[picked]
    distances = [_distance(lam, int(k)) for k in candidates]
    smallest = min(distances)
    return int(candidates[max(i for i, distance in enumerate(distances) if distance == smallest)])


def _distance(lam: Tensor, k: int) -> float:
    """Kolmogorov-Smirnov distance between the k largest eigenvalues and their own power-law fit."""
    alpha = hill(lam, k)
    if alpha == float("inf"):
        return float("inf")
    values = _floored(lam, k)
    ratio = values[1:] / values[0]
    empirical = torch.arange(1, k + 1, device=lam.device) / k
    return float((1 - ratio ** (1 - alpha) - empirical).abs().max())
