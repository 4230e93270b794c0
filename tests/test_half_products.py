"""Products of half precision that are computed in float32, against exact sums rounded once."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aqtx.machine import half_products
from aqtx.program.run_ops import _WIDENED, runnable, traced

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without instructions for them, with slabs of a few columns."""
    monkeypatch.setattr(half_products, "SLOW", frozenset(HALVES))
    monkeypatch.setattr(half_products, "SLAB", 100)


def assert_rounded_once(found: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Within half a unit in the last place of `exact`, and what float32 sums of that `magnitude` may lose."""
    half_unit = torch.finfo(found.dtype).eps / 2 * exact.abs() + torch.finfo(found.dtype).smallest_normal
    assert ((found.double() - exact).abs() <= half_unit * 1.001 + 1e-5 * magnitude).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_and_its_gradients(dtype: torch.dtype, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, 5, 40), (24, 40), (24,), (3, 5, 24))
    )
    leaves = [value.clone().requires_grad_() for value in ((x, weight, bias) if with_bias else (x, weight))]
    y = half_products.linear(*leaves)
    found = (y, *torch.autograd.grad(y, leaves, grad))

    doubles = [value.double().requires_grad_() for value in leaves]
    exact_y = F.linear(*doubles)
    exact = (exact_y, *torch.autograd.grad(exact_y, doubles, grad.double()))
    largest = [value.abs().double().requires_grad_() for value in leaves]
    most = F.linear(*largest)
    magnitudes = (most, *torch.autograd.grad(most, largest, grad.abs().double()))
    for got, wanted, magnitude in zip(found, exact, magnitudes, strict=True):
        assert got.dtype is dtype
        assert_rounded_once(got.detach(), wanted.detach(), magnitude.detach())


def test_a_compiled_linear_has_the_same_values() -> None:
    x, weight = torch.randn(7, 40).bfloat16(), torch.randn(24, 40).bfloat16()
    compiled = torch.compile(half_products.linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight), half_products.linear(x, weight))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mask", ["causal", "added", "chosen"])
def test_attention_and_its_gradients(dtype: torch.dtype, mask: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, heads, 9, 16, generator=generator).to(dtype) for heads in (4, 2, 2, 4))
    chosen = torch.ones(9, 9).tril().bool()
    added = torch.randn(9, 9, generator=generator).to(dtype)

    def attended(attend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        named = {"scale": 0.3, "enable_gqa": True}
        if mask == "causal":
            return attend(q, k, v, None, 0.0, True, **named)
        return attend(q, k, v, attn_mask=chosen if mask == "chosen" else added.to(q.dtype), **named)

    leaves = [value.clone().requires_grad_() for value in (q, k, v)]
    y = attended(half_products.attention, *leaves)
    doubles = [value.double().requires_grad_() for value in (q, k, v)]
    exact = attended(F.scaled_dot_product_attention, *doubles)
    found = (y, *torch.autograd.grad(y, leaves, grad))
    wanted = (exact, *torch.autograd.grad(exact, doubles, grad.double()))
    for got, value in zip(found, wanted, strict=True):
        assert got.dtype is dtype
        assert_rounded_once(got.detach(), value.detach(), value.detach().abs().max())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_of_batches(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 7, 40, generator=generator).to(dtype), torch.randn(3, 40, 5, generator=generator).to(dtype)
    exact, most = a.double() @ b.double(), a.abs().double() @ b.abs().double()
    for multiply in (half_products.product, half_products.batch_product):
        assert_rounded_once(multiply(a, b), exact, most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_torch_s(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 40, dtype=dtype), torch.randn(24, 40, dtype=dtype)
    assert torch.equal(half_products.linear(x, weight), F.linear(x, weight))
    for multiply in (half_products.matmul, half_products.product):
        assert torch.equal(multiply(x, weight.t()), x @ weight.t())
    assert torch.equal(half_products.batch_product(x[None], weight.t()[None]), (x @ weight.t())[None])
    q = x.view(1, 1, 7, 40)
    assert torch.equal(half_products.attention(q, q, q), F.scaled_dot_product_attention(q, q, q))


def test_what_runs_is_taken_back_for_a_compiler() -> None:
    for op in _WIDENED:
        assert traced(runnable(op)) is op
    assert runnable(torch.ops.aten.add.Tensor) is torch.ops.aten.add.Tensor
