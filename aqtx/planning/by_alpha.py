"""What methods that go by alpha share: which way it points, how strongly, and the order that it gives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from aqtx.planning.method import Own
from aqtx.program.site import Site
from aqtx.sensitivity.measured import values

LOW_FIRST = "low_alpha_high_bits"


def strength(own: Own, default: float) -> float:
    """Gamma, or its default; negative where high alphas earn bits."""
    gamma = default if own["gamma"] is None else float(own["gamma"])
    return gamma if own["direction"] == LOW_FIRST else -gamma


def most_sensitive_first(sites: Sequence[Site], own: Own) -> Tensor:
    """Rows from those that earn the most bits to those that earn the least; ties in the model's order."""
    alphas = values(sites, "alpha")
    return torch.argsort(alphas if own["direction"] == LOW_FIRST else -alphas, stable=True)
