"""Robust z-scores: where a value stands among the others, whatever their scale and outliers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from aqtx.program.program import Site

MAD_TO_SIGMA = 1.4826  # of a normal distribution
CLIP = 3.0


def robust_z(values: Tensor) -> Tensor:
    """(x - median) / (1.4826 MAD), clipped to +-3; zero where the spread is zero."""
    if not values.numel():
        return values
    centred = values - median(values)
    spread = MAD_TO_SIGMA * median(centred.abs())
    return (centred / spread).clamp(-CLIP, CLIP) if float(spread) > 0 else torch.zeros_like(values)


def median(values: Tensor) -> Tensor:
    """Between the two middle values of an even count; torch's own median takes the lower one."""
    ordered = values.sort().values
    middle = len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def alpha_scores(sites: Sequence[Site], normalize: str) -> Tensor:
    """z-scores of ln alpha over `all` sites, or within each `category`."""
    logs = torch.tensor([site.get("alpha") for site in sites], dtype=torch.float64).log()
    if normalize == "all":
        return robust_z(logs)
    scores = torch.zeros_like(logs)
    for category in dict.fromkeys(site.category for site in sites):
        rows = torch.tensor([site.category == category for site in sites])
        scores[rows] = robust_z(logs[rows])
    return scores
