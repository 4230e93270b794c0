"""The allocator against scipy's HiGHS, and its time on large models.

    python -m benchmarks.allocate

Costs are errors of real formats times a log-normal sensitivity, sizes those of matrices of four shapes.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from aqtx.numerics.allocate import Allocation, allocate
from aqtx.numerics.knapsack import Problem, prove, relax

_BITS = torch.tensor([3.125, 4.25, 6.25, 8.25], dtype=torch.float64)
_DB = torch.tensor([11.25, 18.8, 30.9, 30.7], dtype=torch.float64)


def problem(num_sites: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Costs and bytes [num_sites, 4]."""
    g = torch.Generator().manual_seed(seed)
    numel = torch.tensor([128, 512, 1024, 2048])[torch.randint(4, (num_sites, 1), generator=g)] * 2048
    error = 10 ** (-_DB / 10) * (0.1 * torch.randn(num_sites, 4, generator=g)).exp()
    return error * torch.randn(num_sites, 1, generator=g).exp() * numel, numel * _BITS / 8


def best_of(work: Callable[[], Allocation], repeats: int) -> tuple[float, Allocation]:
    """The least wall-clock time of a few runs, in milliseconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        found = work()
        times.append(time.perf_counter() - started)
    return min(times) * 1e3, found


def main() -> None:
    """Print a line per size and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print("sites    bits   fast ms      gap   exact ms   HiGHS ms   exact equals HiGHS")
    for num_sites in (250, 3072, 100_000):
        cost, size = problem(num_sites)
        for bits in (3.5, 4.5, 6.0):
            budget = float(size[:, 0].sum() / 3.125 * bits)
            fast, found = best_of(lambda: allocate(cost, size, budget, exact=False), repeats)  # noqa: B023
            line = f"{num_sites:7d} {bits:5.1f} {fast:9.1f} {found.gap:8.1e}"
            if num_sites <= 3072:
                exact, optimum = best_of(lambda: allocate(cost, size, budget, exact=True), repeats)  # noqa: B023
                started = time.perf_counter()
                task = Problem(cost.numpy(), size.numpy(), budget)
                highs = prove(task, relax(task))
                line += f" {exact:10.1f} {(time.perf_counter() - started) * 1e3:10.1f}"
                line += f"   {abs(highs.cost / optimum.cost - 1) < 1e-9}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
