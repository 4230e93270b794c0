"""`ratio`: shares of the matrices in order of alpha. Bits never fall and rise again along the sorted alphas."""

import torch
from torch import Tensor

from aqtx.planning.by_alpha import most_sensitive_first
from aqtx.planning.method import Method, Own, register
from aqtx.planning.question import Options


def choose(options: Options, own: Own, budget: float | None) -> Tensor:
    """A share `bf16_ratio` of the matrices in the top tier, `mxfp4_ratio` in the bottom one."""
    order = most_sensitive_first(options.sites, own)
    num_top, num_bottom = (int(own[key] * len(order)) for key in ("bf16_ratio", "mxfp4_ratio"))
    choice = torch.full((len(order),), 1)
    choice[order[:num_top]] = options.num_candidates - 1
    choice[order[len(order) - num_bottom :]] = 0
    return options.nearest(choice)


register(
    Method(
        name="ratio",
        summary="tiers by shares of the matrices, in order of alpha",
        options=("direction", "mxfp4_ratio", "bf16_ratio"),
        needs=("alpha",),
        choose=choose,
        budget="own",
        candidates=("mxfp4", "mxfp8", "bf16"),
        counts=(2, 3),
    )
)
