"""`uniform`: one format for all, the largest that fits; where pins or limits forbid it, the nearest that they allow."""

import torch
from torch import Tensor

from aqtx.planning.method import Method, Own, register
from aqtx.planning.question import Options


def choose(options: Options, own: Own, budget: float | None) -> Tensor:
    """Of the plans that each candidate makes, the largest within the budget; without one, the largest of all."""
    return every(options, largest(options, budget))


def every(options: Options, candidate: int) -> Tensor:
    """One candidate for all sites, as far as pins and limits allow."""
    return options.nearest(torch.full((len(options.sites),), candidate))


def largest(options: Options, budget: float | None) -> int:
    """The largest candidate whose plan fits; the smallest always does, since no plan is smaller than its."""
    limit = float("inf") if budget is None else budget
    fits = [column for column in range(options.num_candidates) if options.total(every(options, column)) <= limit]
    return fits[-1] if fits else 0


register(
    Method(
        name="uniform",
        summary="the largest candidate that fits, for all",
        choose=choose,
        budget="optional",
        honours_groups=True,
    )
)
