"""The allocator against an integer dynamic programme, on cases as large as a small model."""

import numpy as np
import pytest

from aqtx.numerics.allocate import allocate


def least_cost(cost: np.ndarray, size: np.ndarray, budget: int) -> int:
    """The least total cost within a whole budget: the best for every number of bytes, row after row."""
    best = np.zeros(budget + 1, dtype=np.int64)
    impossible = np.iinfo(np.int64).max // 4
    for costs, sizes in zip(cost, size, strict=True):
        options = np.full((len(costs), budget + 1), impossible)
        for option, (c, s) in enumerate(zip(costs, sizes, strict=True)):
            if s <= budget:
                options[option, s:] = best[: budget + 1 - s] + c
        best = np.minimum(options.min(0), impossible)
    return int(best[-1])


def case(rng: np.random.Generator, offset: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """30 to 110 matrices of three sizes; costs fall fourfold a step, over two decades. Last: the excess."""
    num_sites = int(rng.integers(30, 111))
    unit = rng.choice([1, 2, 3], num_sites)[:, None]
    size = unit * np.array([3, 4, 6, 8]) + rng.integers(0, 2, (num_sites, 4))
    steep = rng.uniform(3, 5, (num_sites, 1)) ** -np.arange(4) * rng.lognormal(0, 1.0, (num_sites, 1)) * unit
    cost = np.rint(1e4 * steep * rng.lognormal(0, 0.1, (num_sites, 4))).astype(np.int64)
    low, high = size.min(1).sum(), size.max(1).sum()
    budget = int(low + rng.uniform(0.02, 0.9) * (high - low))
    return cost, size + offset, budget + num_sites * offset, num_sites * offset


def check(num_cases: int, seed: int, offset: int = 0) -> None:
    rng, wrong = np.random.default_rng(seed), []
    for number in range(num_cases):
        cost, size, budget, excess = case(rng, offset)
        expected = least_cost(cost, size - offset, budget - excess)
        found = allocate(cost.astype(float), size.astype(float), float(budget), exact=True)
        quick = allocate(cost.astype(float), size.astype(float), float(budget), exact=False)
        spent = int(size[np.arange(len(size)), found.choice.numpy()].sum())
        fine = found.cost == expected and found.gap == 0 and spent <= budget and found.bound <= expected
        fine &= quick.bound <= expected * (1 + 1e-12) and quick.cost >= expected and quick.gap <= 1e-3
        wrong += [] if fine else [(number, expected, found.cost, found.bound, quick.bound)]
    assert not wrong, (len(wrong), wrong[:3])


def test_hundreds_of_cases() -> None:
    check(500, seed=0)


@pytest.mark.slow
def test_thousands_of_cases() -> None:
    check(5000, seed=1)


@pytest.mark.parametrize("offset", [10**9, 10**12])
def test_sizes_that_share_a_large_part(offset: int) -> None:
    """The bound stays below the optimum: what all options of a matrix have in common says nothing."""
    check(60, seed=2, offset=offset)
