"""What an online rotation costs: process CPU time with and without, call by call in pairs, one thread.

    python -m benchmarks.rotation_cost                  # a linear behind silu(g) * u, and a tinymoe decode step

Both sides are compiled with the same settings; figures are medians of the pairs' ratios. Defaults: blocks of 32, which
recipes take unless told otherwise, 64, 128 and the full width of a 2048 x 2048 linear at M = 256 and M = 1; a block of
32 before every down_proj of the decode step. A dense block of 128 costs 128 / 2048 = 6.3 % of such a linear by its
multiplications alone: the cheap blocks are those of 32 and 64.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import torch
from torch import Tensor, nn

import aqtx
from aqtx.program.hadamard_op import OP, buffers
from aqtx.program.program import Program
from aqtx.runs.pipeline import run
from aqtx.runs.recipe import build


class Gated(nn.Module):
    """linear(rotate(silu(g) * u)), the rotation only where a block is given."""

    def __init__(self, weight: Tensor, block: int | None) -> None:
        super().__init__()
        self.weight, self.signs = weight, nn.ParameterList()
        for value in buffers(block, 0, weight.dtype).values() if block else ():
            self.signs.append(nn.Parameter(value, requires_grad=False))

    def forward(self, g: Tensor, u: Tensor) -> Tensor:  # noqa: D102
        x = nn.functional.silu(g) * u
        return nn.functional.linear(OP(x, *self.signs) if len(self.signs) else x, self.weight)


def ratio(base: Callable[[], object], other: Callable[[], object], pairs: int) -> tuple[float, float]:
    """Median of other / base, and base's median in microseconds."""
    ratios, times = [], []
    for _ in range(pairs):
        start = time.process_time_ns()
        base()
        middle = time.process_time_ns()
        other()
        ratios.append((time.process_time_ns() - middle) / (middle - start))
        times.append((middle - start) / 1e3)
    return statistics.median(ratios), statistics.median(times)


def linear(blocks: list[int], rows: tuple[int, ...] = (256, 1)) -> None:
    """The linear, at prefill and decode."""
    weight = torch.randn(2048, 2048).bfloat16()
    base = torch.compile(Gated(weight, None), fullgraph=True)
    for block in blocks:
        other = torch.compile(Gated(weight, block), fullgraph=True)
        for count in rows:
            g, u = torch.randn(count, 2048).bfloat16(), torch.randn(count, 2048).bfloat16()
            for warm in (base, other):
                warm(g, u)
            found, us = ratio(lambda g=g, u=u: base(g, u), lambda g=g, u=u, o=other: o(g, u), 400 if count == 1 else 60)
            print(
                f"linear 2048 x 2048, M = {count}, block {block}: {100 * (found - 1):+.1f} % of {us:.0f} us", flush=True
            )


def step(program: Program) -> Callable[[], Tensor]:
    """A compiled decode step of one sequence on an empty cache of 64 slots."""
    config = program.config
    size = config["hidden_size"] // config["num_attention_heads"]
    shape = (1, config["num_key_value_heads"], 64, size)
    cache = [torch.zeros(shape, dtype=program.dtype) for _ in range(2 * config["num_hidden_layers"])]
    module = torch.compile(program.module("step"), fullgraph=True)
    ids, at, start = torch.tensor([[5]]), torch.tensor([7]), torch.tensor([0])
    return lambda: module(ids, at, start, cache)


def decode(model: str, block: int) -> None:
    """A decode step with a rotation before every down_proj, which cannot be fused."""
    rotated = aqtx.trace(model)
    made, _ = build("insert_hadamard", {"before": ["mlp_down"], "block": block}, "")
    assert made is not None
    run(rotated, [made])
    base, other = step(aqtx.trace(model)), step(rotated)
    with torch.no_grad():
        for warm in (base, other):
            for _ in range(5):
                warm()
        found, us = ratio(base, other, 400)
    print(
        f"decode step of {model}, block {block} before down_proj: {100 * (found - 1):+.1f} % of {us:.0f} us", flush=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinymoe")
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 64, 128, 2048])
    args = parser.parse_args()
    torch.set_num_threads(1)
    decode(args.model, 32)
    linear(args.blocks)
