"""`alphaq`: (median(alpha) / alpha_l)^gamma Var(W_l) 2^(-2 b_f), b_f the bits of format f's elements.

The published objective; its budget counts every matrix once, whatever its size, and no scales.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.by_alpha import strength
from aqtx.planning.method import Method, Own, register
from aqtx.program.site import Site
from aqtx.sensitivity.alpha import median
from aqtx.sensitivity.measured import values

GAMMA = 12.0


def cost(sites: Sequence[Site], formats: Sequence[Format], own: Own, seed: int) -> Tensor:
    """The error that nominal bits make of each matrix's variance, weighted by alpha."""
    alphas, variance = values(sites, "alpha"), values(sites, "energy")
    variance = variance / torch.tensor([site.numel for site in sites])
    weight = torch.exp(strength(own, GAMMA) * (median(alphas).log() - alphas.log())) * variance
    bits = torch.tensor([fmt.element.bits for fmt in formats], dtype=torch.float64)
    return weight[:, None] * torch.exp2(-2 * bits)


register(
    Method(
        name="alphaq",
        summary="the published objective of alpha, with its count of nominal bits",
        options=("direction", "gamma"),
        needs=("alpha",),
        cost=cost,
        nominal=True,
        base=False,
        arms={"alphaq": {}},
    )
)
