"""Dynamic quantization of activations, as graph nodes that the plan inserts.

Every token (row of the last dimension) is its own matrix: its scales, and NVFP4's fp32 scale, come from
its own values, so one token's codes never depend on another token. NaN and infinity turn into
NaN for the block that holds them.
"""

import torch
from torch import Tensor

from aqtx.formats.codec import fake_quantize
from aqtx.formats.grouped_linear import group_bounds
from aqtx.formats.table import NVFP4_SCALE, parse


def quantize_tokens(x: Tensor, format_name: str) -> Tensor:
    """`x` [..., K] rounded to a format token by token, in x's own dtype."""
    fmt = parse(format_name)
    rows = x.reshape(-1, x.shape[-1])
    if fmt.scale is NVFP4_SCALE:
        rows = rows.unsqueeze(1)  # a matrix per token
    return fake_quantize(rows, fmt).reshape(x.shape)


@torch.library.custom_op("aqtx::quantize_activation", mutates_args=())
def quantize_activation(x: Tensor, format_name: str) -> Tensor:
    """The values of `x` [..., K] after dynamic quantization per token."""
    return quantize_tokens(x, format_name)


@quantize_activation.register_fake
def _(x: Tensor, format_name: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("aqtx::quantize_activation_grouped", mutates_args=())
def quantize_activation_grouped(x: Tensor, offsets: Tensor, format_names: str) -> Tensor:
    """Rows `x` [T, K] sorted by expert, each expert's in its own format (comma list; empty: untouched)."""
    out = x.clone(memory_format=torch.contiguous_format)
    names = format_names.split(",")
    for expert, start, end in group_bounds(offsets):
        if names[expert]:
            out[start:end] = quantize_tokens(x[start:end], names[expert])
    return out


@quantize_activation_grouped.register_fake
def _(x: Tensor, offsets: Tensor, format_names: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    """Nothing to save: the gradient passes straight through the rounding."""


def _straight_through(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


def _straight_through_grouped(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


quantize_activation.register_autograd(_straight_through, setup_context=_setup)
quantize_activation_grouped.register_autograd(_straight_through_grouped, setup_context=_setup)
