"""Costs [sites, formats] of the methods that solve for the least cost, from what the sites are annotated with.

| method     | cost of format f at site l                                                       |
|------------|----------------------------------------------------------------------------------|
| error      | e_lf = ||W_l - Q_f(W_l)||_F^2, measured                                          |
| alpha      | s_l e_lf, s_l = exp(-gamma z_l), z_l the robust z-score of ln alpha_l            |
| alphaq     | (median(alpha) / alpha_l)^gamma Var(W_l) 2^(-2 b_f), b_f the element's bits      |
| hessian    | sum_nk h_k (W - Q)_nk^2, h_k the mean square of input channel k                  |
| pmq        | frequency x summed gate weight x e_lf                                            |
| fisher     | 1/2 D^T F D, D = Q - W, F the Fisher information: the divergence it predicts      |
| trial      | divergence when l alone is rounded to its smallest format, in proportion to e_lf |
| calibrated | exp(a + b z_l) e_lf, a and b fitted per role to what was measured                |
| random     | exp(n_l) e_lf, n_l standard normal                                               |
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.settings import Settings
from aqtx.program.site import Site
from aqtx.sensitivity.alpha import alpha_scores, median
from aqtx.sensitivity.fisher import KEYS
from aqtx.sensitivity.measured import error_table, table

CostFunction = Callable[[Sequence[Site], Sequence[Format], Settings, int], Tensor]


def _annotation(sites: Sequence[Site], key: str) -> Tensor:
    return torch.tensor([site.get(key) for site in sites], dtype=torch.float64)


def _error(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    return error_table(sites, formats)


def _alpha(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    weight = torch.exp(-settings.strength * alpha_scores(sites, settings.normalize))
    return weight[:, None] * error_table(sites, formats)


def _alphaq(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    alphas, variance = _annotation(sites, "alpha"), _annotation(sites, "energy")
    variance = variance / torch.tensor([site.numel for site in sites])
    weight = torch.exp(settings.strength * (median(alphas).log() - alphas.log())) * variance
    bits = torch.tensor([fmt.element.bits for fmt in formats], dtype=torch.float64)
    return weight[:, None] * torch.exp2(-2 * bits)


def _hessian(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    return table(sites, formats, "hessian")


def _pmq(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    weight = _annotation(sites, "frequency") * _annotation(sites, "gate_weight")
    return weight[:, None] * error_table(sites, formats)


def _fisher(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    return table(sites, formats, KEYS[settings.fisher_detail])


def _trial(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    """The measured divergence at one format, carried over to the others by their errors."""
    errors = error_table(sites, formats)
    measured = table(sites, formats, "trial_loss")
    first = measured.isfinite().to(torch.int64).argmax(1, keepdim=True)
    return (measured / errors.clamp_min(1e-300)).gather(1, first) * errors


def _calibrated(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    return _annotation(sites, "calibrated").exp()[:, None] * error_table(sites, formats)


def _random(sites: Sequence[Site], formats: Sequence[Format], settings: Settings, seed: int) -> Tensor:
    noise = torch.randn(len(sites), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.exp()[:, None] * error_table(sites, formats)


COSTS: dict[str, CostFunction] = {
    "error": _error,
    "alpha": _alpha,
    "alphaq": _alphaq,
    "hessian": _hessian,
    "pmq": _pmq,
    "fisher": _fisher,
    "trial": _trial,
    "calibrated": _calibrated,
    "random": _random,
}
