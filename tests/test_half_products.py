"""Products of half precision that are computed in float32, against exact sums rounded once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aqtx.machine import half_products
from aqtx.program.run_ops import runnable, traced

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_torch_s(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 40, dtype=dtype), torch.randn(24, 40, dtype=dtype)
    assert torch.equal(half_products.linear(x, weight), F.linear(x, weight))
    assert torch.equal(half_products.matmul(x, weight.t()), x @ weight.t())


def test_what_runs_is_taken_back_for_a_compiler() -> None:
    linear = torch.ops.aten.linear.default
    assert traced(runnable(linear)) is linear
    assert runnable(torch.ops.aten.add.Tensor) is torch.ops.aten.add.Tensor
