"""Products of bfloat16 and float16 on processors without instructions for them.

There torch multiplies element by element: 10 billion operations a second, or 1 where the right matrix is not
transposed, against 70 in float32. Here the operands are widened to float32, slab by slab, and the result is rounded
once, as torch rounds its own float32 sums; only the order of summation differs. On other processors and devices, and
for other dtypes, everything is torch's.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SLAB = 1 << 24  # elements of a matrix that are widened at once: 64 MB
FEWEST_ROWS = 4  # fewer are limited by reading the matrix, which widening makes slower


def _slow_dtypes() -> frozenset[torch.dtype]:
    """Dtypes that torch multiplies element by element on this processor."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    known = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in known.items() if not supported)


SLOW = _slow_dtypes()  # no function with a cache: torch.compile traces whoever asks


def is_widened(a: Tensor, b: Tensor) -> bool:
    """Whether a product is computed in float32 here; those of tensor subclasses are theirs."""
    plain = type(b) in (Tensor, torch.nn.Parameter) and a.dtype is b.dtype
    return plain and a.dtype in SLOW and a.device.type == "cpu"


def mm(a: Tensor, b: Tensor, *, out: Tensor, bias: Tensor | None = None) -> None:
    """out = a @ b + bias of [M, L], [L, N] and [N]; no gradient flows through it."""
    if a.shape[0] < FEWEST_ROWS or not is_widened(a, b):
        torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
        return
    wide = a.float()
    for columns in _slabs(b.shape[1], b.shape[0]):
        part = wide @ b[:, columns].float()
        out[:, columns] = part if bias is None else part.add_(bias[columns])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., L] @ b [L, N] -> [..., N]; where it is widened no gradient flows through it."""
    if not is_widened(a, b):
        return a @ b
    out = a.new_empty(*a.shape[:-1], b.shape[1])
    mm(a.reshape(-1, a.shape[-1]), b, out=out.view(-1, b.shape[1]))
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Scaled dot product attention of [..., S, D], with the further arguments of torch's."""
    attend = F.scaled_dot_product_attention
    if not _pays(q, k):
        return attend(q, k, v, *rest, **named)
    rest, named = tuple(map(_widened, rest)), {name: _widened(value) for name, value in named.items()}
    return attend(q.float(), k.float(), v.float(), *rest, **named).to(q.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of batches of matrices, as torch.matmul has them."""
    return (a.float() @ b.float()).to(a.dtype) if _pays(a, b) else torch.matmul(a, b)


def batch_product(a: Tensor, b: Tensor) -> Tensor:
    """a [B, M, L] @ b [B, L, N] -> [B, M, N]."""
    return torch.bmm(a.float(), b.float()).to(a.dtype) if _pays(a, b) else torch.bmm(a, b)


def _pays(a: Tensor, b: Tensor) -> bool:
    """Whether to widen a product of activations with each other, each of which is read once."""
    rows = a.shape[-2] if a.dim() > 1 else 1
    return is_widened(a, b) and not (isinstance(rows, int) and rows < FEWEST_ROWS)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K].T + bias [N] -> [..., N]."""
    rows = x.numel() // max(x.shape[-1], 1)
    if not is_widened(x, weight) or (isinstance(rows, int) and rows < FEWEST_ROWS):
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    """Keeps the operands as they are for the backward pass, not their float32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        mm(x.reshape(-1, x.shape[-1]), weight.t(), out=out.view(-1, weight.shape[0]), bias=bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            mm(rows, weight, out=grad_x.view(-1, x.shape[-1]))
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            mm(rows.t(), x.reshape(-1, x.shape[-1]), out=grad_weight)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.float().sum(0).to(grad.dtype)
        return grad_x, grad_weight, grad_bias


def _slabs(num_columns: int, num_rows: int) -> Iterator[slice]:
    width = max(1, SLAB // max(num_rows, 1))
    return (slice(start, min(start + width, num_columns)) for start in range(0, num_columns, width))
