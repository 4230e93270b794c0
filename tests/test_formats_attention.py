"""Attention over a cache by the compiled kernel, against the definition in float64."""

import pytest
import torch
from torch import Tensor

from aqtx.formats import kernel

pytestmark = pytest.mark.skipif(not kernel.available(), reason="no compiled kernel")


def defined(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v in float64, key-value heads repeated."""
    times = q.shape[1] // k.shape[1]
    k, v = (part.double().repeat_interleave(times, 1) for part in (k, v))
    scores = (q.double() @ k.mT * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def case(heads: int, groups: int, length: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two sequences of which the second begins with padding, at the end of a cache of 37 slots."""
    g = torch.Generator().manual_seed(length)
    q = torch.randn(2, length, heads, size, generator=g).transpose(1, 2)  # as a projection leaves it
    k, v = (torch.randn(2, groups, 37, size, generator=g) for _ in range(2))
    places, slots = torch.arange(20, 20 + length).view(-1, 1), torch.arange(37)
    mask = (slots <= places) & (slots >= torch.tensor([0, 5]).view(-1, 1, 1, 1))
    return q.to(dtype), k.to(dtype), v.to(dtype), mask


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 64), (9, 3, 64), (2, 1, 40)])
@pytest.mark.parametrize("length", [1, 4, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_attention(heads: int, groups: int, size: int, length: int, dtype: torch.dtype) -> None:
    q, k, v, mask = case(heads, groups, length, size, dtype)
    made = torch.ops.aqtx_cpu.attention(q, k, v, mask, 0.125)
    assert made.dtype is dtype and made.transpose(1, 2).is_contiguous()
    # An output is a mean of values (at most 4.5 here). bf16 rounds it once, torch's kernel for many queries also the
    # weights; float32 sums of 64 products and 37 weights err by 2^-24 each.
    allowed = 4.5 * (2**-7 if dtype is torch.bfloat16 else 101 * 2**-24)
    assert (made.double() - defined(q, k, v, mask, 0.125)).abs().max() <= allowed


def test_slots_that_the_mask_hides_are_not_read() -> None:
    q, k, v, mask = case(4, 2, 1, 64, torch.bfloat16)
    expected = torch.ops.aqtx_cpu.attention(q, k, v, mask, 0.125)
    hidden = ~mask[:, 0, 0]
    for part in (k, v):
        part.transpose(1, 2)[hidden] = float("nan")
    assert torch.equal(torch.ops.aqtx_cpu.attention(q, k, v, mask, 0.125), expected)
    none = torch.ops.aqtx_cpu.attention(q, k, v, torch.zeros_like(mask), 0.125)
    assert torch.equal(none, torch.zeros_like(none))


def test_nan_and_wrong_shapes_are_not_hidden() -> None:
    q, k, v, mask = case(4, 2, 1, 64, torch.float32)
    k[0, 0, 3] = float("nan")
    assert torch.ops.aqtx_cpu.attention(q, k, v, mask, 0.125)[0, 0].isnan().all()
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.aqtx_cpu.attention(q, k[:1], v, mask, 0.125)
    with pytest.raises(RuntimeError, match="a mask"):
        torch.ops.aqtx_cpu.attention(q, k, v, mask.float(), 0.125)
