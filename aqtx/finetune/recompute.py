"""A part of a model whose gradients are taken by computing it again: nothing of it stays in memory but its inputs.

The part runs on several batches. Its weights are loaded once for all of them, forward and once more backward, and a
batch's activations are let go before the next batch makes its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aqtx.finetune.pieces import Weights
from aqtx.machine.memory import release_unused


@dataclass(frozen=True)
class Part:
    """What is computed again.

    Attributes:
        load: reads the weights that do not train.
        run: of those, of what trains, of a batch's number and of its inputs that carry a gradient, the batch's results.
        trained: names of what trains.
    """

    load: Callable[[], Weights]
    run: Callable[[Weights, Weights, int, Sequence[Tensor]], list[Any]]
    trained: tuple[str, ...]


def recomputed(part: Part, trained: Weights, inputs: Sequence[Sequence[Tensor]]) -> list[list[Any]]:
    """The results of each batch, whose inputs that carry a gradient are given; as many of each."""
    flat = [*(trained[name] for name in part.trained), *(value for batch in inputs for value in batch)]
    found: Sequence[Any]
    if torch.is_grad_enabled() and any(value.requires_grad for value in flat):
        found = _Recomputed.apply(part, [len(part.trained), *map(len, inputs)], *flat)  # type: ignore[no-untyped-call]
    else:
        found = _each(part, flat[: len(part.trained)], inputs)
    return _cut(found, [len(found) // len(inputs)] * len(inputs))


def _each(part: Part, trained: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]]) -> list[Any]:
    """The results of all batches, one after another."""
    weights, own = part.load(), dict(zip(part.trained, trained, strict=True))
    return [value for index, given in enumerate(inputs) for value in part.run(weights, own, index, given)]


def _cut(values: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [list(values[end - count : end]) for end, count in zip(ends, counts, strict=True)]


class _Recomputed(torch.autograd.Function):
    """Results of all batches, without a graph of what lies between."""

    @staticmethod
    def forward(ctx: Any, part: Part, counts: list[int], *flat: Tensor) -> tuple[Any, ...]:
        trained, *inputs = _cut(flat, counts)
        found = _each(part, trained, inputs)
        ctx.part, ctx.counts = part, counts
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        tensors = [value for value in found if isinstance(value, Tensor)]
        ctx.mark_non_differentiable(*(value for value in tensors if not value.is_floating_point()))
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        part, (trained, *batches) = ctx.part, _cut(ctx.saved_tensors, ctx.counts)
        came = _cut(gradients, [len(gradients) // len(batches)] * len(batches))
        weights, sums, into = part.load(), [torch.zeros_like(value) for value in trained], list[Tensor | None]()
        for index, inputs in enumerate(batches):
            leaves = [value.detach().requires_grad_() for value in (*trained, *inputs)]
            own = _gradients_of(part, weights, index, leaves, came[index])
            for total, value in zip(sums, own, strict=False):
                if value is not None:
                    total += value
            into += own[len(trained) :]
            release_unused()  # of the graph, before the next batch makes one
        return None, None, *sums, *into


def _gradients_of(
    part: Part, weights: Weights, index: int, leaves: Sequence[Tensor], came: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients that a batch's results hand on to what trains and to its inputs."""
    count = len(part.trained)
    with torch.enable_grad():
        found = part.run(weights, dict(zip(part.trained, leaves, strict=False)), index, leaves[count:])
    reached = [
        (value, gradient)
        for value, gradient in zip(found, came, strict=True)
        if gradient is not None and value.requires_grad
    ]
    if not reached:
        return [None] * len(leaves)
    values, given = zip(*reached, strict=True)
    return list(torch.autograd.grad(values, leaves, given, allow_unused=True))
