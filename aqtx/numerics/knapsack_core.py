"""The exact search of the multiple-choice knapsack: dynamic programming over what the bound leaves open.

A choice's cost is `Z + sum_l r_l + lam (B - S)`: the bound, plus the reduced costs of its options, plus what
unspent budget is worth. So a choice that beats the best known cost U has reduced costs below the room U - Z in
sum. A state is a set of deviations from each row's reduced-cost minimum: the bytes they add and their reduced
cost. Of two states the one that is neither larger nor dearer suffices. Rows come in the order of their cheapest
deviation.

Legend as in `knapsack`; a state's `grown` is its bytes beyond the base choice, `dear` its sum of reduced costs.
"""

from dataclasses import dataclass

import numpy as np

from aqtx.numerics.knapsack import MAX_HISTORY, MAX_STATES, ROUNDING, Floats, Ints, Problem, Solution


@dataclass(frozen=True)
class _Core:
    """Rows that keep several options, cheapest deviation first, and what the rest of the rows can still add."""

    base: Ints  # each row's option of least reduced cost
    rows: Ints
    grown: Floats  # [rows, F] bytes beyond the base option
    dear: Floats  # [rows, F] reduced costs
    least_later: Floats  # [rows + 1] least sum of `grown` over the rows from here on
    most_later: Floats
    slack: float  # budget minus the base choice's size
    price: float


@dataclass(frozen=True)
class _States:
    grown: Floats
    dear: Floats
    parent: Ints
    option: Ints


def _core(problem: Problem, price: float, room: float) -> _Core:
    reduced = problem.cost + price * problem.size
    reduced = reduced - reduced.min(axis=1, keepdims=True)
    base = reduced.argmin(axis=1)
    open_option = reduced < room
    several = np.flatnonzero(open_option.sum(axis=1) > 1)
    cheapest = np.where(np.arange(reduced.shape[1]) == base[:, None], np.inf, reduced).min(axis=1)
    rows = several[np.argsort(cheapest[several], kind="stable")]
    grown = problem.size[rows] - problem.size[rows, base[rows]][:, None]
    within = np.where(open_option[rows], grown, 0.0)

    def later(values: Floats) -> Floats:
        return np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])

    least, most = later(within.min(axis=1)), later(within.max(axis=1))
    return _Core(base, rows, grown, reduced[rows], least, most, problem.budget - problem.size_of(base), price)


def _extend(core: _Core, states: _States, stage: int, room: float) -> _States:
    """All states with one more row decided, without the hopeless and the dominated."""
    options = np.flatnonzero(core.dear[stage] < room)
    grown = (states.grown[:, None] + core.grown[stage, options]).ravel()
    dear = (states.dear[:, None] + core.dear[stage, options]).ravel()
    unspent = np.maximum(core.slack - grown - core.most_later[stage + 1], 0.0)
    hopeful = (grown + core.least_later[stage + 1] <= core.slack) & (dear + core.price * unspent < room)
    kept = np.flatnonzero(hopeful)
    value = dear[kept] - core.price * grown[kept]  # the cost up to a constant
    kept = kept[np.lexsort((value, grown[kept]))]
    value = dear[kept] - core.price * grown[kept]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(value)[:-1]])
    kept = kept[value < best_before]
    return _States(grown[kept], dear[kept], kept // len(options), options[kept % len(options)])


def _trace_back(core: _Core, history: list[_States], index: int) -> Ints:
    """The choice that led to a state of the last stage."""
    choice = core.base.copy()
    for stage in range(len(history) - 1, -1, -1):
        choice[core.rows[stage]] = history[stage].option[index]
        index = int(history[stage].parent[index])
    return choice


def refine(problem: Problem, start: Solution, target_gap: float = 0.0) -> Solution:
    """The optimum, or a choice within `target_gap` of the bound; `complete` is False where the search was cut off."""
    best, cost = start.choice, start.cost
    margin = ROUNDING * max(abs(cost), abs(start.bound))
    room = cost - start.bound - margin
    core = _core(problem, start.price, room)
    states = _States(np.zeros(1), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))
    history: list[_States] = []
    seen = 0
    for stage in range(len(core.rows)):
        if room <= 0 or not states.grown.size or cost - start.bound <= target_gap * abs(start.bound):
            break
        states = _extend(core, states, stage, room)
        history.append(states)
        seen += states.grown.size
        if states.grown.size > MAX_STATES or seen > MAX_HISTORY:
            return Solution(best, cost, start.bound, start.price, complete=False)
        last = int(np.searchsorted(states.grown, core.slack, side="right")) - 1
        if last < 0:
            continue
        found = start.bound + states.dear[last] + core.price * (core.slack - states.grown[last])
        if found < cost - margin:  # values fall with size: the largest that fits is the cheapest
            best = _trace_back(core, history, last)
            cost = problem.cost_of(best)
            room = cost - start.bound - margin
    reached = 0 < cost - start.bound <= target_gap * abs(start.bound)
    return Solution(best, cost, start.bound if reached else cost, start.price)
