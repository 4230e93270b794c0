"""Methods that need no costs: one format for all, or tiers along the depth or along alpha.

Each returns a format index per site. Along alpha the order is always monotone: from one end of the sorted alphas to the
other bits never fall and rise again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.planning.options import Options
from aqtx.planning.settings import Settings


def uniform(options: Options, settings: Settings, budget: float | None) -> Tensor:
    """One format for all: the largest candidate within the budget, or the only one."""
    if budget is None and settings.num_candidates > 1:
        raise InputError("method uniform needs average_bits or budget_bytes to choose among several candidates")
    totals = (options.size * options.share[:, None]).sum(0)[: settings.num_candidates]
    fits = totals <= (float("inf") if budget is None else budget)
    if not bool(fits.any()):  # possible where pins or limits make the cheapest plan smaller than one format for all
        raise InputError("no single candidate fits the budget")
    return torch.full((len(options.sites),), int(torch.where(fits, totals, -1.0).argmax()))


def even(options: Options, settings: Settings, budget: float | None) -> Tensor:
    """The largest uniform format that fits and the next one, spread over the model as evenly as the budget allows."""
    if budget is None:
        raise InputError("method even needs average_bits or budget_bytes")
    choice = uniform(options, settings, budget)
    low = int(choice[0]) if len(choice) else 0
    if low + 1 >= settings.num_candidates:
        return choice
    size = options.size * options.share[:, None]
    left, step = budget - float(size[:, low].sum()), size[:, low + 1] - size[:, low]
    fraction = left / float(step.sum())
    due = torch.arange(1, len(choice) + 1, dtype=torch.float64) * fraction + 1e-9
    raised = due.floor() > torch.cat([torch.zeros(1, dtype=torch.float64), due[:-1]]).floor()
    raised &= (step * raised).cumsum(0) <= left
    return choice + raised.long()


def front_back(options: Options, settings: Settings, budget: float | None) -> Tensor:
    """The largest candidate from one end of the depth on, the smallest for the rest.

    Half of the layers get the largest, or as many matrices as the budget allows.
    """
    low, high = 0, settings.num_candidates - 1
    layers = torch.tensor([-1 if site.layer is None else site.layer for site in options.sites])
    depth = int(layers.max()) + 1 if len(layers) else 0
    choice = torch.full((len(layers),), low)
    if budget is None:
        half = (layers < depth / 2) if settings.half == "front" else (layers >= depth / 2)
        choice[half & (layers >= 0)] = high
        return choice
    size = options.size * options.share[:, None]
    left = budget - float(size[:, low].sum())
    order = torch.argsort(layers if settings.half == "front" else -layers, stable=True)
    for row in order[layers[order] >= 0].tolist():
        left -= float(size[row, high] - size[row, low])
        if left < 0:
            break
        choice[row] = high
    return choice


def _most_sensitive_first(options: Options, settings: Settings) -> Tensor:
    """Rows from those that earn the most bits to those that earn the least; ties in the model's order."""
    alphas = torch.tensor([site.get("alpha") for site in options.sites], dtype=torch.float64)
    return torch.argsort(alphas if settings.direction == "low_alpha_high_bits" else -alphas, stable=True)


def ratio(options: Options, settings: Settings, budget: float | None) -> Tensor:
    """By alpha, a share `bf16_ratio` of the matrices in the top tier, `mxfp4_ratio` in the bottom one."""
    order = _most_sensitive_first(options, settings)
    num_top, num_bottom = (int(share * len(order)) for share in (settings.bf16_ratio, settings.mxfp4_ratio))
    bottom, middle, top = _three_tiers(options, settings)
    choice = torch.full((len(order),), middle)
    choice[order[:num_top]] = top
    choice[order[len(order) - num_bottom :]] = bottom
    return choice


def _three_tiers(options: Options, settings: Settings) -> tuple[int, int, int]:
    count = settings.num_candidates
    if count not in (2, 3) or (count == 2 and settings.bf16_ratio > 0):
        raise InputError(
            "method ratio needs three candidates, for the bottom, the middle and the top tier "
            "(two will do where bf16_ratio is 0)"
        )
    return (0, 1, count - 1)


def threshold(options: Options, settings: Settings, budget: float | None) -> Tensor:
    """The larger of two candidates on the sensitive side of one alpha, the smaller on the other."""
    if settings.num_candidates != 2:
        raise InputError("method threshold needs two candidates")
    alphas = torch.tensor([site.get("alpha") for site in options.sites], dtype=torch.float64)
    border = float(settings.alpha_threshold or 0.0)
    sensitive = alphas < border if settings.direction == "low_alpha_high_bits" else alphas > border
    return sensitive.long()


def honour_limits(choice: Tensor, options: Options) -> Tensor:
    """Move a choice that a pin or limit forbids to the nearest allowed format by size."""
    chosen = options.size.gather(1, choice[:, None])
    distance = torch.where(options.allowed, (options.size - chosen).abs(), torch.inf)
    return distance.argmin(1)


TIERS: dict[str, Callable[[Options, Settings, float | None], Tensor]] = {
    "uniform": uniform,
    "even": even,
    "front_back": front_back,
    "ratio": ratio,
    "threshold": threshold,
}
