"""`aqtx::grouped_linear`: one graph node for all experts' products with one stacked weight.

Legend: T tokens x experts per token (rows sorted by expert), E experts, K inputs, N outputs.
Row block `offsets[e-1]:offsets[e]` of `x` belongs to expert `e`. A plain weight is unquantized;
a tensor subclass decides for itself in `__torch_dispatch__` how its slices are read
(`grouped_packed.py`), so the graph never changes with the plan.
"""

from typing import Any

import torch
from torch import Tensor

from aqtx.machine.half_products import mm


def group_bounds(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of each expert that has rows; `offsets` [E] are end rows."""
    bounds, start = [], 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            bounds.append((expert, start, end))
        start = end
    return bounds


@torch.library.custom_op("aqtx::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`y[i] = x[i] @ weight[e].T` for rows `i` of expert `e`: x [T, K], weight [E, N, K] -> [T, N]."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for expert, start, end in group_bounds(offsets):
        mm(x[start:end], weight[expert].t(), out=out[start:end])
    return out


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("aqtx::grouped_linear_grad_input", mutates_args=())
def grouped_linear_grad_input(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of `grouped_linear` for its rows: grad [T, N], weight [E, N, K] -> [T, K]."""
    out = grad.new_empty(grad.shape[0], weight.shape[2])
    for expert, start, end in group_bounds(offsets):
        mm(grad[start:end], weight[expert], out=out[start:end])
    return out


@grouped_linear_grad_input.register_fake
def _(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[2])


@torch.library.custom_op("aqtx::grouped_linear_grad_weight", mutates_args=())
def grouped_linear_grad_weight(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of `grouped_linear` for its weight: grad [T, N], x [T, K] -> [E, N, K]."""
    out = grad.new_zeros(offsets.shape[0], grad.shape[1], x.shape[1])
    for expert, start, end in group_bounds(offsets):
        mm(grad[start:end].t(), x[start:end], out=out[expert])
    return out


@grouped_linear_grad_weight.register_fake
def _(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets = inputs
    ctx.weight_needs_grad = weight.requires_grad
    ctx.save_for_backward(x if weight.requires_grad else None, weight, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_input = torch.ops.aqtx.grouped_linear_grad_input(grad, weight, offsets)
    grad_weight = None
    if ctx.weight_needs_grad:
        grad_weight = torch.ops.aqtx.grouped_linear_grad_weight(grad, x, offsets)
    return grad_input, grad_weight, None


grouped_linear.register_autograd(_backward, setup_context=_save_for_backward)
