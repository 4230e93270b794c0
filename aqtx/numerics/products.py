"""Products of float32 matrices, by the faster of torch's two libraries.

On x86 `torch.mm` is MKL, which takes the wide vectors of one maker's processors only; oneDNN, which comes with the same
torch, takes them all: 230 billion operations a second against 105 on a Zen 5 core. Which one serves depends on the
machine and on shapes alone, so results are the same in every run.
"""

import platform
from functools import cache

import torch
from torch import Tensor

SMALLEST = 64  # of any side; below it the call costs more than it saves


@cache
def _has_onednn() -> bool:
    """Whether torch was built with oneDNN for this processor, and has the op that Inductor multiplies by."""
    known = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B of [M, L] and [L, N], in any strides; no gradient flows through it."""
    if not _suits(A, B):
        return A @ B
    is_dense = B.is_contiguous() or B.t().is_contiguous()  # others would take a thousand times as long
    return torch.ops.mkldnn._linear_pointwise(A, (B if is_dense else B.contiguous()).t(), None, "none", [], "")


def add_product(to: Tensor, A: Tensor, B: Tensor, *, alpha: float = 1.0) -> None:
    """to += alpha A @ B."""
    if _suits(A, B):
        to.add_(product(A, B), alpha=alpha)
    else:
        to.addmm_(A, B, alpha=alpha)


def _suits(A: Tensor, B: Tensor) -> bool:
    serves = A.device.type == "cpu" and A.dtype is torch.float32 and B.dtype is torch.float32
    return serves and min(*A.shape, B.shape[1]) >= SMALLEST and _has_onednn()
