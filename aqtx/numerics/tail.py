"""Where the tail of a spectrum begins, and the Hill estimate of its exponent.

A power law `p(lam) ~ lam^-alpha` above a threshold `lam_{r-k}` has the maximum-likelihood exponent

    alpha = 1 + k / sum_{i=1..k} ln(lam_{r-i+1} / lam_{r-k})

over the k eigenvalues above it. The rules differ only in how they choose k:

    k_fraction   k = max(10, floor(k_fraction * r))
    xmin_mid     k = floor(r / 2)
    ks           the threshold of least Kolmogorov-Smirnov distance, as in WeightWatcher
    xmin_peak    the same near the peak of the histogram of log10(lam): 100 bins, from 0.95 to 1.5 times the
                 left edge of the highest

The last two follow the tools they come from and count the threshold among the tail: n = k + 1 stands for k in
the numerator, and the distance between the tail's empirical distribution and the fitted power law is

    D = max_{i=0..n-1} |1 - (lam_{r-k+i} / lam_{r-k})^(1 - alpha) - i / n|
"""

import torch
from torch import Tensor

RULES = ("k_fraction", "xmin_mid", "xmin_peak", "ks")
MIN_TAIL = 10
MIN_EIGENVALUE = 1e-12  # a denominator of zero (a rank-deficient matrix) is taken for this,
MIN_RELATIVE = 1e-6  # or, so that tiny weights keep their alpha, for this share of the largest where that is less
MAX_KS_THRESHOLDS = 1024  # evenly spaced in k beyond: a pooled spectrum of 16,384 values would need 10^8 powers
KS_SLICE = 128  # thresholds at a time
PEAK_BINS = 100
_COUNTING_THRESHOLD = ("ks", "xmin_peak")


def hill(lam: Tensor, k: int, rule: str = "k_fraction") -> float:
    """The exponent over the k largest of the ascending spectrum `lam`."""
    logs = _floored(lam, k).log()
    spread = float(logs[1:].sum() - k * logs[0])
    return 1.0 + (k + (rule in _COUNTING_THRESHOLD)) / spread if spread > 0 else float("inf")


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
        k = _least_distance(lam, _near_peak(lam) if rule == "xmin_peak" else torch.arange(1, r))
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
    """The tail size of least distance among the ascending candidates; the largest tail of equals."""
    if candidates.numel() > MAX_KS_THRESHOLDS:
        picked = torch.arange(MAX_KS_THRESHOLDS) * (candidates.numel() - 1) // (MAX_KS_THRESHOLDS - 1)
        candidates = candidates[picked]
    logs = _floored(lam, lam.numel() - 1).log()
    distances = torch.cat([_distances(logs, part) for part in candidates.to(lam.device).split(KS_SLICE)])
    smallest = (distances == distances.min()).nonzero()
    return int(candidates[int(smallest[-1])])


def _distances(logs: Tensor, sizes: Tensor) -> Tensor:
    """D for tails of k = `sizes` values above their thresholds; `logs` is the whole ascending spectrum."""
    r = logs.numel()
    logs = logs[r - 1 - int(sizes.max()) :]  # [width]: what the largest of these tails holds
    width = logs.numel()
    above = (logs - logs[width - 1 - sizes, None]).clamp_min(0)  # [sizes, width] ln(lam / threshold)
    n = (sizes + 1)[:, None]
    alpha = 1 + n / above.sum(1, keepdim=True)
    place = torch.arange(width, device=logs.device) - (width - n)  # position in the tail, negative below it
    gap = (-torch.expm1((1 - alpha) * above) - place / n).abs()
    worst = torch.where(place >= 0, gap, 0.0).amax(1)
    return torch.where(alpha.flatten().isfinite(), worst, torch.inf)
