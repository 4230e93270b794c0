"""The multiple-choice knapsack: one option per row, least total cost, total size within a budget.

Three solvers on top of one another, each given what the one before found:

1. `relax`: the linear relaxation. A row's options on the lower convex hull of (size, cost) become steps; the
   best steps per byte are taken until the budget is spent. The price `lam` of a byte at that point gives the
   lower bound `Z = sum_l min_f (c_lf + lam s_lf) - lam B`, valid for any lam >= 0. Filling up greedily gives a
   feasible choice. O(L F log L F).
2. `refine`: exact. An option whose reduced cost `r_lf = c_lf + lam s_lf - min_f (...)` exceeds the room between
   the best known cost and Z cannot be part of a better choice. The few rows that keep several options are
   searched by dynamic programming over Pareto states (size, cost), cheapest deviations first, so that better
   choices are found early and the room shrinks.
3. `prove`: HiGHS' branch and bound, where the states become too many.

Legend: L rows, F options, c cost, s size, B budget, lam price of a byte, Z lower bound.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_STATES = 1_000_000  # of one stage
MAX_HISTORY = 20_000_000  # of all stages together: 16 bytes each
ROUNDING = 1e-12  # two sums of the same costs in another order differ by less, relative
FILL_ROUNDS = 64


@dataclass(frozen=True)
class Problem:
    """Costs and sizes [L, F]; an option that is not allowed costs infinity."""

    cost: Floats
    size: Floats
    budget: float

    def cost_of(self, choice: Ints) -> float:
        """Total cost of a choice, rounded once."""
        return math.fsum(self.cost[np.arange(len(choice)), choice])

    def size_of(self, choice: Ints) -> float:
        """Total size of a choice."""
        return math.fsum(self.size[np.arange(len(choice)), choice])


@dataclass(frozen=True)
class Solution:
    """A feasible choice, a lower bound on the cost of any, and the price of a byte that gives the bound."""

    choice: Ints
    cost: float
    bound: float
    price: float = 0.0
    complete: bool = True  # False: the search was cut off, the bound is the relaxation's

    def gap(self) -> float:
        """(cost - bound) relative to the bound."""
        return max(0.0, self.cost - self.bound) / max(abs(self.bound), 1e-300) if self.cost > self.bound else 0.0


def smallest(problem: Problem) -> Ints:
    """The smallest allowed option of each row, the cheapest of equals."""
    size = np.where(np.isfinite(problem.cost), problem.size, np.inf)
    least = size == size.min(axis=1, keepdims=True)
    choice: Ints = np.where(least, problem.cost, np.inf).argmin(axis=1)
    return choice


@dataclass(frozen=True)
class _Steps:
    """Hull steps in the order of falling gain per byte; a row's own steps keep their order."""

    row: Ints
    option: Ints
    size: Floats
    rate: Floats


def _hull_steps(problem: Problem, start: Ints) -> _Steps:
    """From each row's smallest option along its lower convex hull: the steepest descent, again and again."""
    rows, current = np.arange(len(start)), start.copy()
    found: list[tuple[Ints, Ints, Floats, Floats]] = []
    while rows.size:
        more = problem.size[rows] - problem.size[rows, current[rows]][:, None]
        gain = problem.cost[rows, current[rows]][:, None] - problem.cost[rows]
        rate = np.divide(gain, more, out=np.full_like(gain, -np.inf), where=(more > 0) & (gain > 0))
        best = rate.max(axis=1)
        rows, rate, more, best = (part[best > 0] for part in (rows, rate, more, best))
        option = np.where(rate == best[:, None], more, -np.inf).argmax(axis=1)
        found.append((rows, option, more[np.arange(len(rows)), option], best))
        current[rows] = option
    row, option, size, rate = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(-rate, kind="stable")  # within a row rates fall, and equal ones keep their order
    return _Steps(row[order], option[order], size[order], rate[order])


def relax(problem: Problem) -> Solution:
    """The relaxation's bound and a greedy choice; the budget must hold the smallest choice."""
    choice = smallest(problem)
    left = problem.budget - problem.size_of(choice)
    steps = _hull_steps(problem, choice)
    spent = np.cumsum(steps.size)
    split = int(np.searchsorted(spent, left, side="right"))
    price = float(steps.rate[split]) if split < len(spent) else 0.0
    choice[steps.row[:split]] = steps.option[:split]
    left -= float(spent[split - 1]) if split else 0.0
    left = _take_what_fits(choice, steps, split, left)
    _fill(problem, choice, left)
    return Solution(choice, problem.cost_of(choice), lower_bound(problem, price), price)


def lower_bound(problem: Problem, price: float) -> float:
    """Z at a price per byte."""
    spent = price * problem.budget if price else 0.0  # a budget without end has the price 0
    return math.fsum((problem.cost + price * problem.size).min(axis=1)) - spent


def _take_what_fits(choice: Ints, steps: _Steps, split: int, left: float) -> float:
    """Go on past the split: take each later step that fits and whose row has not missed one."""
    sizes = steps.size[split:]
    if not sizes.size:
        return left
    smallest_later = np.minimum.accumulate(sizes[::-1])[::-1]
    missed: set[int] = set()
    for row, option, size, least in zip(
        steps.row[split:].tolist(), steps.option[split:].tolist(), sizes.tolist(), smallest_later.tolist(), strict=True
    ):
        if least > left:
            break
        if size <= left and row not in missed:
            choice[row] = option
            left -= size
        else:
            missed.add(row)
    return left


def _fill(problem: Problem, choice: Ints, left: float) -> None:
    """Spend what is left on single changes, off the hull too, the largest gain first."""
    rows = np.arange(len(choice))
    for _ in range(FILL_ROUNDS):
        more = problem.size - problem.size[rows, choice][:, None]
        gain = np.where(more <= left, problem.cost[rows, choice][:, None] - problem.cost, 0.0)
        row, option = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[row, option] <= 0:
            return
        left -= float(more[row, option])
        choice[row] = option


def prove(problem: Problem, start: Solution) -> Solution:
    """HiGHS on the whole problem; keeps `start` where HiGHS finds nothing better within the budget."""
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import coo_array

    row, option = np.nonzero(np.isfinite(problem.cost))
    scale = 1e6 / max(abs(start.cost), 1e-300)  # HiGHS stops at an absolute gap of 1e-6
    choose_one = coo_array((np.ones(len(row)), (row, np.arange(len(row)))), shape=(len(problem.cost), len(row)))
    unit = 1e6 / problem.budget if problem.budget > 0 else 1.0
    result = milp(
        problem.cost[row, option] * scale,
        integrality=np.ones(len(row)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(choose_one.tocsr(), 1, 1),
            LinearConstraint(problem.size[row, option][None] * unit, ub=problem.budget * unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    bound = max(start.bound, result.mip_dual_bound / scale) if result.mip_dual_bound is not None else start.bound
    if result.x is None:
        return Solution(start.choice, start.cost, min(bound, start.cost), start.price)
    choice = start.choice.copy()
    picked = result.x > 0.5
    choice[row[picked]] = option[picked]
    cost = problem.cost_of(choice)
    better = cost < start.cost and problem.size_of(choice) <= problem.budget
    choice, cost = (choice, cost) if better else (start.choice, start.cost)
    return Solution(choice, cost, min(bound, cost), start.price)
