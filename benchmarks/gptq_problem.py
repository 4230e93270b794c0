"""One mixture-of-experts layer for `benchmarks/gptq.py`: weights, calibration rows, and the error on held-out rows.

Rows are drawn with spectrum 1/i in a basis that all experts share, tilted a little for each; experts'
loads differ by more than an order of magnitude, as they do in practice. Everything is float32 from a seed.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT = 512  # rows per expert


def make_problem(experts: int, hidden: int, intermediate: int, mean_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Gate and up [E, I, H], down [E, H, I], rows sorted by expert with end offsets, and the same held out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    problem = {
        "gate": normal(experts, intermediate, hidden) / hidden**0.5,
        "up": normal(experts, intermediate, hidden) / hidden**0.5,
        "down": normal(experts, hidden, intermediate) / intermediate**0.5,
    }
    turn = torch.linalg.qr(normal(hidden, hidden))[0]
    root = torch.arange(1, hidden + 1) ** -0.5
    root /= root.square().mean().sqrt()  # channels of unit power on average
    share = torch.exp(0.8 * normal(experts))
    counts = (share / share.sum() * experts * mean_tokens).long().clamp_min(1)
    tilt = torch.exp(0.3 * normal(experts, hidden))
    for prefix, sizes in (("", counts), ("held_", torch.full((experts,), HELD_OUT))):
        parts = [(normal(int(size), hidden) * root * tilt[e]) @ turn for e, size in enumerate(sizes)]
        inner = [F.silu(x @ problem["gate"][e].T) * (x @ problem["up"][e].T) for e, x in enumerate(parts)]
        problem[prefix + "rows"], problem[prefix + "inner"] = torch.cat(parts), torch.cat(inner)
        problem[prefix + "offsets"] = sizes.cumsum(0).to(torch.int32)
    return problem


def inputs_of(projection: str) -> str:
    """Which rows a projection reads."""
    return "inner" if projection == "down" else "rows"


def held_out_error(problem: dict[str, Tensor], projection: str, Q: Tensor) -> Tensor:
    """|x (W - Q)^T|^2 over the held-out rows of each expert: [E]."""
    ends = [0, *problem["held_offsets"].tolist()]
    x = problem["held_" + inputs_of(projection)]
    D = problem[projection] - Q
    return torch.stack([(x[a:b] @ D[e].T).square().sum() for e, (a, b) in enumerate(pairwise(ends))])
