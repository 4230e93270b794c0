"""Costs [sites, formats] of the methods that solve for the least cost.

| method | cost of format f at site l                                                       |
|--------|----------------------------------------------------------------------------------|
| error  | e_lf = ||W_l - Q_f(W_l)||_F^2, measured                                          |
| alpha  | s_l e_lf, s_l = exp(-gamma z_l), z_l the robust z-score of ln alpha_l            |
| alphaq | (median(alpha) / alpha_l)^gamma Var(W_l) 2^(-2 b_f), b_f the element's bits      |
| random | exp(n_l) e_lf, n_l standard normal                                               |
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.settings import Settings
from aqtx.program import Site
from aqtx.sensitivity.measured import error_table

MAD_TO_SIGMA = 1.4826  # of a normal distribution
CLIP = 3.0


def robust_z(values: Tensor) -> Tensor:
    """(x - median) / (1.4826 MAD), clipped to +-3; zero where the spread is zero."""
    centred = values - _median(values)
    spread = MAD_TO_SIGMA * _median(centred.abs())
    return (centred / spread).clamp(-CLIP, CLIP) if float(spread) > 0 else torch.zeros_like(values)


def _median(values: Tensor) -> Tensor:
    """The median, between the two middle values of an even count; torch's own takes the lower one."""
    return values.quantile(0.5)


def alpha_scores(sites: Sequence[Site], normalize: str) -> Tensor:
    """z-scores of ln alpha over all sites or within each category."""
    logs = torch.tensor([site.get("alpha") for site in sites], dtype=torch.float64).log()
    if normalize == "all":
        return robust_z(logs)
    scores = torch.zeros_like(logs)
    for category in sorted({site.category for site in sites}):
        rows = torch.tensor([site.category == category for site in sites])
        scores[rows] = robust_z(logs[rows])
    return scores


def _error(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    return error_table(sites, formats)


def _alpha(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    weight = torch.exp(-settings.strength * alpha_scores(sites, settings.normalize))
    return weight[:, None] * error_table(sites, formats)


def _alphaq(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    alphas = torch.tensor([site.get("alpha") for site in sites], dtype=torch.float64)
    variance = torch.tensor([site.get("energy") / site.numel for site in sites], dtype=torch.float64)
    weight = torch.exp(settings.strength * (_median(alphas).log() - alphas.log())) * variance
    bits = torch.tensor([fmt.element.bits for fmt in formats], dtype=torch.float64)
    return weight[:, None] * torch.exp2(-2 * bits)


def _random(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    noise = torch.randn(len(sites), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.exp()[:, None] * error_table(sites, formats)


CostFunction = Callable[[Sequence[Site], Sequence[Format], Settings, int], Tensor]
COSTS: dict[str, CostFunction] = {"error": _error, "alpha": _alpha, "alphaq": _alphaq, "random": _random}
