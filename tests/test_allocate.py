"""The allocator against brute force and HiGHS, its promises on budget, gap and order, and its refusals."""

import itertools
import time

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, milp
from torch import Tensor

from aqtx.errors import InputError
from aqtx.numerics.allocate import Allocation, allocate
from aqtx.numerics.knapsack import Problem, prove, relax
from aqtx.numerics.knapsack_core import refine

BITS = torch.tensor([3.125, 4.25, 6.25, 8.25], dtype=torch.float64)


def model_like(num_sites: int, seed: int = 0, sizes: tuple[int, ...] = (256,)) -> tuple[Tensor, Tensor]:
    """Costs as errors of real formats times a log-normal sensitivity; bytes of matrices of several sizes."""
    g = torch.Generator().manual_seed(seed)
    error = 10 ** -(torch.tensor([11.25, 18.8, 30.9, 30.7]) / 10) * (0.1 * torch.randn(num_sites, 4, generator=g)).exp()
    sensitivity = torch.randn(num_sites, 1, generator=g).exp()
    numel = torch.tensor(sizes)[torch.randint(len(sizes), (num_sites, 1), generator=g)] * 1024
    return (error * sensitivity * numel).double(), numel * BITS / 8


def brute_force(cost: Tensor, size: Tensor, budget: float) -> float:
    """The least cost over all choices."""
    rows = range(len(cost))
    choices = itertools.product(range(cost.shape[1]), repeat=len(cost))
    return min(
        sum(float(cost[i, f]) for i, f in zip(rows, choice, strict=True))
        for choice in choices
        if sum(float(size[i, f]) for i, f in zip(rows, choice, strict=True)) <= budget
    )


def spent(found: Allocation, values: Tensor) -> float:
    """The sum over sites of the chosen format's value."""
    return float(values.gather(1, found.choice[:, None]).sum())


def test_equals_brute_force() -> None:
    """Random integers with many ties, sizes that do not grow with quality, and budgets from tight to loose."""
    rng = np.random.default_rng(0)
    for trial in range(60):
        shape = (int(rng.integers(1, 6)), int(rng.integers(1, 5)))
        cost = torch.from_numpy(rng.integers(0, 12, shape).astype(float))
        size = torch.from_numpy(rng.integers(1, 12, shape).astype(float))
        low, high = float(size.min(1).values.sum()), float(size.max(1).values.sum())
        budget = low + (high - low) * (trial % 6) / 5
        found = allocate(cost, size, budget)
        assert found.cost == brute_force(cost, size, budget), f"trial {trial}"
        assert found.gap == 0 and found.bound == found.cost
        assert spent(found, cost) == found.cost and spent(found, size) == found.size <= budget


def test_core_search_proves_what_highs_proves() -> None:
    for seed, bits in itertools.product(range(2), (3.5, 5.0, 6.2)):
        cost, size = model_like(60, seed, (128, 256, 704))
        problem = Problem(cost.numpy(), size.numpy(), float(size[:, 0].sum() / 3.125 * bits))
        start = relax(problem)
        ours, highs = refine(problem, start), prove(problem, start)
        assert ours.complete and ours.cost == pytest.approx(highs.cost, rel=1e-12)
        assert start.bound <= ours.cost <= start.cost


def test_falls_back_to_highs_where_the_search_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, size = model_like(30, 1, (128, 200, 704))
    budget = float(size[:, 1].sum()) * 1.1
    expected = allocate(cost, size, budget, exact=True)
    monkeypatch.setattr("aqtx.numerics.knapsack_core.MAX_STATES", 1)
    assert allocate(cost, size, budget, exact=True).cost == pytest.approx(expected.cost, rel=1e-12)


def test_a_whole_model_in_milliseconds_with_a_bound() -> None:
    """3072 matrices x 4 formats. 50 ms is the promise; the test allows for a busy machine."""
    cost, size = model_like(3072, sizes=(1024, 2048))
    for bits in (3.3, 4.5, 5.5, 7.0):
        budget = float(size[:, 0].sum() / 3.125 * bits)
        start = time.process_time()
        fast = allocate(cost, size, budget)
        assert time.process_time() - start < 0.5
        exact = allocate(cost, size, budget, exact=True)
        assert fast.gap <= 1e-3 and fast.size <= budget
        assert exact.gap == 0 and fast.bound <= exact.cost <= fast.cost


def test_more_budget_never_costs_more_than_the_gap() -> None:
    cost, size = model_like(500, 2, (128, 704))
    low, high = float(size[:, 0].sum()), float(size[:, 3].sum())
    found = [allocate(cost, size, low + (high - low) * i / 40, exact=False) for i in range(41)]
    for before, after in itertools.pairwise(found):
        assert after.cost <= before.cost * (1 + after.gap) * (1 + 1e-12)
    best = float(cost.min(1).values.sum())
    assert found[-1].cost == pytest.approx(best) and found[0].size == low


def test_deterministic_and_independent_of_units() -> None:
    cost, size = model_like(300, 3, (128, 704))
    budget = float(size[:, 1].sum()) * 1.2
    first, again = allocate(cost, size, budget), allocate(cost, size, budget)
    scaled = allocate(cost * 1e-9, size * 1024, budget * 1024)
    assert first.choice.tolist() == again.choice.tolist() == scaled.choice.tolist()


def test_quality_need_not_grow_with_bits() -> None:
    """mxfp6 beats mxfp8 on most sites: a loose budget leaves bytes unspent."""
    cost = torch.tensor([[8.0, 1.0, 2.0]] * 5)
    size = torch.tensor([[4.25, 6.25, 8.25]] * 5)
    found = allocate(cost, size, 1e9)
    assert found.choice.tolist() == [1] * 5 and found.gap == 0


def test_groups_share_a_format() -> None:
    g = torch.Generator().manual_seed(5)
    cost, size = torch.rand(6, 3, generator=g).double(), torch.rand(6, 3, generator=g).double()
    groups = [7, 2, 7, 2, 9, 7]
    budget = float(size.mean(1).sum())
    found = allocate(cost, size, budget, groups=groups)
    members = [[0, 2, 5], [1, 3], [4]]
    merged = (torch.stack([values[rows].sum(0) for rows in members]) for values in (cost, size))
    assert found.cost == pytest.approx(brute_force(*merged, budget), rel=1e-12)
    assert all(len({int(found.choice[i]) for i in rows}) == 1 for rows in members)
    assert spent(found, size) <= budget


def test_allowed_options_pin_and_limit() -> None:
    cost, size = model_like(6, 6)
    allowed = torch.ones(6, 4, dtype=torch.bool)
    allowed[0] = torch.tensor([True, False, False, False])
    allowed[1, 0] = False
    found = allocate(cost, size, float(size[:, 1].sum()), allowed=allowed)
    assert found.choice[0] == 0 and found.choice[1] >= 1
    masked = torch.where(allowed, cost, torch.inf)
    assert found.cost == pytest.approx(brute_force(masked, size, float(size[:, 1].sum())), rel=1e-12)


def test_agrees_with_a_plain_milp_of_its_own() -> None:
    """The objective and constraints written out from scratch, solved by HiGHS."""
    cost, size = model_like(25, 8, (128, 300, 704))
    budget = float(size[:, 1].sum()) * 1.15
    one_each = np.kron(np.eye(25), np.ones(4))
    result = milp(
        cost.flatten().numpy(),
        integrality=np.ones(100),
        bounds=(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size.flatten().numpy()[None], ub=budget)],
    )
    assert allocate(cost, size, budget).cost == pytest.approx(result.fun, rel=1e-6)


def test_nothing_to_decide() -> None:
    found = allocate(torch.empty(0, 3), torch.empty(0, 3), 0.0)
    assert found.choice.tolist() == [] and found.gap == 0
    single = allocate(torch.tensor([[2.0], [3.0]]), torch.tensor([[1.0], [1.0]]), 2)
    assert single.choice.tolist() == [0, 0] and single.cost == 5


@pytest.mark.parametrize(
    ("cost", "size", "sentence"),
    [
        ([[1.0, 2.0]], [[10.0, 20.0]], "the budget of 5 bytes is below the smallest possible, 10 bytes."),
        ([[1.0, float("nan")]], [[1.0, 2.0]], "site 0: its cost is not a number."),
        ([[float("inf")] * 2], [[1.0, 2.0]], "site 0: its constraints, or its group's, allow no format."),
        ([[1.0, 2.0]], [[-1.0, 2.0]], "a size is negative or not finite."),
    ],
)
def test_refusals(cost: list[list[float]], size: list[list[float]], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        allocate(torch.tensor(cost), torch.tensor(size), 5)
    assert caught.value.problems == [sentence]


def test_pins_count_towards_the_smallest_possible() -> None:
    allowed = torch.tensor([[False, True], [True, True]])
    with pytest.raises(InputError, match="smallest possible, 30 bytes"):
        allocate(torch.ones(2, 2), torch.tensor([[10.0, 20.0], [10.0, 20.0]]), 25, allowed=allowed)
