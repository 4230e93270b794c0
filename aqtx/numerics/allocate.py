"""Choose one format per site: least total cost with all sizes within a budget, and how far from the optimum it is.

Every answer carries a lower bound on the cost of any choice, so `gap = (cost - bound) / bound` says what a
better solver could still gain. Constraints become part of the problem: sites of a group share a format by
adding up their rows, a pinned or limited site loses the other options.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.numerics.knapsack import Problem, Solution, prove, relax, smallest
from aqtx.numerics.knapsack_core import refine

Table = Tensor | np.ndarray | Sequence[Sequence[float]]
EXACT_PAIRS = 1000  # (site, format) pairs up to which the optimum is proven unasked
TARGET_GAP = 1e-3


@dataclass(frozen=True)
class Allocation:
    """The chosen format index of each site, its cost, a lower bound on any choice's cost, and the relative gap."""

    choice: Tensor  # [num_sites] int64
    cost: float
    bound: float
    gap: float
    size: float


def allocate(
    cost: Table,
    size: Table,
    budget: float,
    *,
    exact: bool | None = None,
    groups: Sequence[int] | None = None,
    allowed: Table | None = None,
) -> Allocation:
    """One format per site of least total `cost` with total `size` <= `budget`.

    `cost`, `size`: [num_sites, num_formats], tensors, arrays or lists of numbers; an infinite cost forbids the
    option, as False in `allowed` does. `groups` gives each site a group number: sites of one group get one format.
    `exact` proves the optimum (gap 0); the default does so up to 1,000 pairs and otherwise stops at a gap of 1e-3.
    """
    site_cost, sizes = _table(cost, "cost"), _table(size, "size")
    if sizes.shape != site_cost.shape:
        raise InputError(f"cost has shape {site_cost.shape}, size {sizes.shape}.")
    if allowed is not None:
        site_cost = np.where(_table(allowed, "allowed") != 0, site_cost, np.inf)
    group = _group_numbers(groups, len(site_cost))
    problem = Problem(_sum_rows(site_cost, group), _sum_rows(sizes, group), float(budget))
    _check(problem, sizes, group)
    if len(site_cost) == 0:
        return Allocation(torch.empty(0, dtype=torch.int64), 0.0, 0.0, 0.0, 0.0)
    if not np.array_equal(sizes, np.rint(sizes)):  # fractions of bytes add up with rounding: stay below the line
        least = problem.size_of(smallest(problem))
        problem = replace(problem, budget=max(least, problem.budget * (1 - 1e-12)))
    # sizes beyond each row's least: a large part common to a row's sizes would leave the bound few digits
    common = np.take_along_axis(problem.size, smallest(problem)[:, None], axis=1)
    beyond = Problem(problem.cost, problem.size - common, problem.budget - math.fsum(common.ravel()))
    found = _solve(beyond, exact if exact is not None else problem.cost.size <= EXACT_PAIRS)
    choice = torch.from_numpy(found.choice[group])
    bound = min(found.bound, found.cost)  # sums of the same costs in another order
    return Allocation(choice, found.cost, bound, found.gap(), problem.size_of(found.choice))


def least_size(size: Tensor, allowed: Tensor, groups: Sequence[int] | None = None) -> float:
    """The total of the smallest allowed formats: no budget below it can be met."""
    if len(size) == 0:
        return 0.0
    sizes = np.where(_table(allowed, "allowed") != 0, _table(size, "size"), np.inf)
    return float(_sum_rows(sizes, _group_numbers(groups, len(sizes))).min(axis=1).sum())


def _solve(problem: Problem, exact: bool) -> Solution:
    found = relax(problem)
    target = 0.0 if exact else TARGET_GAP
    if found.gap() <= target:
        return found
    found = refine(problem, found, target)
    return found if found.complete or found.gap() <= target else prove(problem, found)


def _table(values: Table, name: str) -> np.ndarray:
    """Numbers [num_sites, num_formats] in float64."""
    table = torch.as_tensor(values).detach().double().cpu().numpy()
    if table.ndim != 2:
        raise InputError(f"{name} must be [num_sites, num_formats], not of shape {table.shape}.")
    return table


def _group_numbers(groups: Sequence[int] | None, num_sites: int) -> np.ndarray:
    """Groups [num_sites] counted from 0; without any, each site is its own."""
    if groups is None:
        return np.arange(num_sites)
    if len(groups) != num_sites:
        raise InputError(f"groups must give each of {num_sites} sites a number, there are {len(groups)}.")
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def _sum_rows(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Rows of one group added up."""
    total = np.zeros((int(group.max()) + 1 if len(group) else 0, values.shape[1]))
    np.add.at(total, group, values)
    return total


def _check(problem: Problem, sizes: np.ndarray, group: np.ndarray) -> None:
    if np.isnan(problem.cost).any() or np.isneginf(problem.cost).any():
        raise InputError(f"site {_first(np.isnan(problem.cost).any(axis=1), group)}: its cost is not a number.")
    if not np.isfinite(sizes).all() or (sizes < 0).any():
        raise InputError("a size is negative or not finite.")
    without = ~np.isfinite(problem.cost).any(axis=1)
    if without.any():
        raise InputError(f"site {_first(without, group)}: its constraints, or its group's, allow no format.")
    if math.isnan(problem.budget):
        raise InputError("the budget is not a number.")
    least = problem.size_of(smallest(problem)) if len(problem.cost) else 0.0
    if problem.budget < least:
        raise InputError(
            f"the budget of {problem.budget:,.0f} bytes is below the smallest possible, {least:,.0f} bytes."
        )


def _first(rows: Any, group: np.ndarray) -> int:
    """The first site that belongs to a marked row."""
    return int(np.flatnonzero(rows[group])[0])
