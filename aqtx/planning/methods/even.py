"""`even`: the largest uniform format that fits and the next one, spread as evenly as the budget allows."""

import torch
from torch import Tensor

from aqtx.planning.method import Method, Own, register
from aqtx.planning.methods.uniform import every, largest
from aqtx.planning.question import Options


def choose(options: Options, own: Own, budget: float | None) -> Tensor:
    """Of the sites that pins and limits leave a choice, every n-th gets the larger format."""
    low = largest(options, budget)
    choice = every(options, low)
    if low + 1 >= options.num_candidates or budget is None:
        return choice
    higher = every(options, low + 1)
    rows = (higher != choice).nonzero().flatten()
    counted = options.counted
    step = counted[rows, higher[rows]] - counted[rows, choice[rows]]
    left = budget - options.total(choice)
    fraction = left / max(float(step.sum()), 1e-300)
    due = torch.arange(1, len(rows) + 1, dtype=torch.float64) * fraction + 1e-9
    raised = due.floor() > torch.cat([torch.zeros(1, dtype=torch.float64), due[:-1]]).floor()
    raised &= (step * raised).cumsum(0) <= left
    choice[rows[raised]] = higher[rows[raised]]
    return choice


register(
    Method(
        name="even",
        summary="two neighbouring candidates, spread evenly to meet the budget",
        choose=choose,
        arms={"uniform": {}},  # so that its bytes equal those of the other arms
    )
)
