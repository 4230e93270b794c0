"""`prior`: a relative squared error weighted by what it costs in a relative of the model, by role and depth."""

from collections.abc import Sequence

import torch
from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.method import Method, Own, register
from aqtx.planning.profile import read_profile
from aqtx.program.site import Site
from aqtx.sensitivity.measured import table


def cost(sites: Sequence[Site], formats: Sequence[Format], own: Own, seed: int) -> Tensor:
    """Nats per token, up to one factor for the whole model."""
    weight = torch.tensor(read_profile(own["prior"]).at(sites), dtype=torch.float64).exp()
    return weight[:, None] * table(sites, formats, "error")


def problems(sites: Sequence[Site], own: Own) -> list[str]:
    """Roles that the relative does not have."""
    return read_profile(own["prior"]).problems(sites)


register(
    Method(
        name="prior",
        summary="squared error weighted by role and depth as the plan of a smaller relative of the model tells",
        options=("prior",),
        cost=cost,
        problems=problems,
    )
)
