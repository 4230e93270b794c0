"""The plan whose worst domain is as near as possible to the best that this domain could have at the same bytes.

Every domain d of a text has costs c_d of its own. r_d(x) = sum of plan x's c_d over the least that any plan within the
budget reaches for d is its regret; sought is the plan of least max_d r_d. For weights w of the domains that add up to
1, the plan that is best for sum_d w_d r_d gives a lower bound on that maximum, by its own bound. Kelley's cutting
planes look for the weights with the highest bound: each plan found says r . w for all weights, a linear programme takes
the weights at which the least of these is largest, and the allocator answers with the best plan there. Of all plans
seen the one of least maximum stays; how far it can be from the optimum is told.

Legend: D domains, L sites, F formats, w weights [D], r regrets [D].
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aqtx.numerics.allocate import Allocation

Solve = Callable[[Tensor], Allocation]  # costs [L, F] -> the plan of least cost within the budget, with its bound
ROUNDS = 100
ENOUGH = 1e-3  # relative gap at which the search ends
_NOTHING = 1e-12  # a least cost below so much of the largest one is none


@dataclass(frozen=True)
class Minimax:
    """A plan, its regrets [D], and a bound below which no plan's largest regret is."""

    choice: Tensor
    regret: Tensor
    bound: float
    rounds: int

    @property
    def gap(self) -> float:
        """(largest regret - bound) relative to the bound."""
        return max(float(self.regret.max()) / self.bound - 1, 0.0)


def regrets(cost: Tensor, choice: Tensor, least: Tensor) -> Tensor:
    """r [D] of a choice [L] under costs [D, L, F], against the least costs [D]."""
    reached = cost.gather(2, choice.expand(len(cost), -1)[..., None]).sum((1, 2))
    return reached / _divisor(least)


def least_regret(cost: Tensor, least: Tensor, solve: Solve) -> Minimax:
    """The plan of least largest regret, up to the gap that is told.

    Args:
        cost: [D, L, F]; what is not allowed is the business of `solve`.
        least: [D], what each domain's own best plan costs.
        solve: the allocator.
    """
    scaled = cost / _divisor(least)[:, None, None]
    weights = np.full(len(cost), 1 / len(cost))
    seen: list[np.ndarray] = []
    choices: list[Tensor] = []
    bound, ceiling = 0.0, np.inf
    for _ in range(ROUNDS):
        found = solve((torch.from_numpy(weights)[:, None, None] * scaled).sum(0))
        bound = max(bound, found.bound)
        choices.append(found.choice)
        seen.append(regrets(cost, found.choice, least).numpy())
        weights, ceiling = _highest(np.stack(seen))
        best = min(float(row.max()) for row in seen)
        if min(ceiling, best) <= bound * (1 + ENOUGH):
            break
    index = int(np.argmin([row.max() for row in seen]))
    return Minimax(choices[index], torch.from_numpy(seen[index]), max(bound, 1e-300), len(seen))


def _highest(seen: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights [D] at which the least of the plans' weighted regrets [plans, D] is largest, and that value."""
    from scipy.optimize import linprog  # half a second to import, for one objective

    plans, domains = seen.shape
    result = linprog(
        np.concatenate([np.zeros(domains), [-1.0]]),  # maximize t
        A_ub=np.concatenate([-seen, np.ones((plans, 1))], axis=1),  # t <= r . w of every plan
        b_ub=np.zeros(plans),
        A_eq=np.concatenate([np.ones(domains), [0.0]])[None],
        b_eq=[1.0],
        bounds=[(0, None)] * domains + [(None, None)],
        method="highs",
    )
    weights = np.maximum(result.x[:-1], 0)
    return weights / weights.sum(), float(result.x[-1])


def _divisor(least: Tensor) -> Tensor:
    """What costs are divided by: a domain whose best plan costs nothing is held against next to nothing."""
    return least.clamp_min(max(float(least.max()) * _NOTHING, 1e-300))
