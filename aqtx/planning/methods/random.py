"""`random`: exp(n_l) e_lf, n_l standard normal by the seed, e_lf the squared error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.method import Method, Own, register
from aqtx.program.site import Site
from aqtx.sensitivity.measured import error_table


def cost(sites: Sequence[Site], formats: Sequence[Format], own: Own, seed: int) -> Tensor:
    """Squared errors times noise."""
    noise = torch.randn(len(sites), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.exp()[:, None] * error_table(sites, formats)


register(
    Method(
        name="random",
        summary="squared error times seeded noise: the baseline that others must beat",
        options=("seed",),
        cost=cost,
        base=False,
        arms={"random": {}},
    )
)
