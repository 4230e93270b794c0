"""`front_back`: the largest candidate from one end of the depth on, the smallest for the rest."""

import torch
from torch import Tensor

from aqtx.planning.method import Method, Own, register
from aqtx.planning.methods.uniform import every
from aqtx.planning.question import Options


def choose(options: Options, own: Own, budget: float | None) -> Tensor:
    """Half of the layers get the largest, or as many matrices as the budget allows."""
    layers = torch.tensor([-1 if site.layer is None else site.layer for site in options.sites])
    depth = int(layers.max()) + 1 if len(layers) else 0
    choice, higher = every(options, 0), every(options, options.num_candidates - 1)
    in_front = own["half"] == "front"
    if budget is None:
        half = ((layers < depth / 2) if in_front else (layers >= depth / 2)) & (layers >= 0)
        choice[half] = higher[half]
        return choice
    counted = options.counted
    left = budget - options.total(choice)
    order = torch.argsort(layers if in_front else -layers, stable=True)
    for row in order[layers[order] >= 0].tolist():
        left -= float(counted[row, higher[row]] - counted[row, choice[row]])
        if left < 0:
            break
        choice[row] = higher[row]
    return choice


register(
    Method(
        name="front_back",
        summary="one end of the depth in the largest candidate, the rest in the smallest",
        options=("half",),
        choose=choose,
        budget="optional",
        candidates=("mxfp4", "mxfp8"),
    )
)
