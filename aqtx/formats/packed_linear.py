"""`aqtx::quantized_linear`: a linear with a packed weight, differentiable with respect to its input.

The op exists so that autograd sees one node: in training nothing but the packed weight is saved, and
the backward pass dequantizes it again. Lowered, it is the compiled kernel where there is one. In plain
torch it is a fused product over slabs for a single row (`one_row.py`), else dequantize and multiply.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from aqtx.formats import kernel, one_row
from aqtx.machine.half_products import linear

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@torch.library.custom_op("aqtx::quantized_linear", mutates_args=())
def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` for a weight that is a tensor subclass; plain weights go through unchanged."""
    return F.linear(x, weight, bias)


@quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("aqtx::quantized_linear_grad_input", mutates_args=())
def quantized_linear_grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of `quantized_linear` for its input."""
    return grad @ weight


@quantized_linear_grad_input.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, bias = inputs
    ctx.has_bias_grad = bias is not None and bias.requires_grad
    ctx.save_for_backward(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
    (weight,) = ctx.saved_tensors
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias_grad else None
    return torch.ops.aqtx.quantized_linear_grad_input(grad, weight), None, grad_bias


quantized_linear.register_autograd(_backward, setup_context=_save_for_backward)


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, Tensor | None]:
    """(x, weight, bias) of any spelling of a linear call."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    return named["input"], named["weight"], named.get("bias")


def lower(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """A linear in ops on the weight's inner tensors: the compiled kernel, or plain torch."""
    fmt = weight.format
    if fmt.is_packed and kernel.decodes(fmt) and x.dtype in KERNEL_DTYPES and kernel.serves(x.device):
        y = kernel.linear(x, weight.qdata, weight.scales, fmt, weight.num_columns)
        return y if bias is None else y + bias
    # only where the shape is known: a dynamic number of rows must not be specialised
    # float64 waits for exact sums
    single = statically_known_true(x.numel() == x.shape[-1])
    if single and x.dtype in KERNEL_DTYPES and one_row.fits(weight):
        y = one_row.product(x, weight)
        return y if bias is None else y + bias
    return linear(x, weight.dequantize(x.dtype), bias)
