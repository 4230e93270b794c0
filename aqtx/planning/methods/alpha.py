"""`alpha`: s_l e_lf, with s_l = exp(-gamma z_l), z_l the robust z-score of ln alpha_l, e_lf the squared error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.by_alpha import strength
from aqtx.planning.method import Method, Own, register
from aqtx.program.site import Site
from aqtx.sensitivity.alpha import alpha_scores
from aqtx.sensitivity.measured import error_table

GAMMA = 0.25
_REVERSED = {"direction": "high_alpha_high_bits"}


def cost(sites: Sequence[Site], formats: Sequence[Format], own: Own, seed: int) -> Tensor:
    """Squared errors, larger where alpha marks a matrix as sensitive."""
    weight = torch.exp(-strength(own, GAMMA) * alpha_scores(sites, own["normalize"]))
    return weight[:, None] * error_table(sites, formats)


register(
    Method(
        name="alpha",
        summary="squared error weighted by alpha, how heavy-tailed a matrix's spectrum is",
        options=("direction", "gamma", "normalize"),
        needs=("alpha",),
        cost=cost,
        arms={
            "alpha": {},
            "alpha_reversed": _REVERSED,
            "alpha_strong": {"gamma": 2.0},
            "alpha_strong_reversed": {"gamma": 2.0, **_REVERSED},
            "alpha_role": {"normalize": "category"},
        },
    )
)
