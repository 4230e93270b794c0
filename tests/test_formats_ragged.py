"""Compiled code at widths that no block divides: every element is written, forward and backward.

Inductor's loops over blocks must not leave the rest of a row unwritten. What is unwritten holds what the memory held
before, so memory is filled with NaN and freed again before each compiled call.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aqtx.formats import MixedExperts, QuantizedTensor, fake_quantize, kernel, quantize
from aqtx.formats.grouped_linear import grouped_linear
from aqtx.formats.grouped_linear_packed import lowering
from tests.formats.cases import EVERY, K_QUANTS, normal

NUM_ROWS = 24
OTHERS = sorted({name.partition("@")[0] for name in (*EVERY, *K_QUANTS)})
FEW = [("int4", 576), ("mxfp4", 100), ("int3_asym", 300), ("nvfp4", 104), ("q4_k", 300), ("q3_k", 96), ("q4_k", 96)]
WIDTHS = (100, 96, 192, 300, 576)


def poison() -> None:
    """Fill memory that the allocator will hand out next with NaN."""
    sizes = [NUM_ROWS * width * size // 4 for width in (*WIDTHS, 104, 128, 384, 640) for size in (1, 2, 4)]
    held = [torch.full((count,), float("nan")) for count in sizes * 4]
    assert all(torch.isnan(each).all() for each in held)


def packed(name: str, num_columns: int) -> QuantizedTensor:
    return quantize(normal(NUM_ROWS, num_columns, dtype=torch.bfloat16), name)


def values(weights: list[Tensor]) -> list[Tensor]:
    return [weight.dequantize() for weight in weights]


def products(inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    return [F.linear(x, weight) for x, weight in zip(inputs, weights, strict=True)]


def check(cases: list[tuple[str, int]]) -> None:
    weights = [packed(name, width) for name, width in cases]
    dense = values(weights)
    inputs = [normal(3, width, seed=1, dtype=torch.bfloat16).requires_grad_() for _, width in cases]
    torch._dynamo.reset()
    decoding, multiplying = torch.compile(values, fullgraph=True), torch.compile(products, fullgraph=True)
    for _ in range(2):  # the second call allocates what the first one freed
        poison()
        got = decoding(weights)
    poison()
    outputs = multiplying(inputs, weights)
    poison()
    grads = torch.autograd.grad([y.float().sum() for y in outputs], inputs)
    wrong = []
    for case, found, plain, x, y, grad in zip(cases, got, dense, inputs, outputs, grads, strict=True):
        # sums of 24 terms and of a row in another order, rounded to bf16 once: within 2 units of the result's scale
        apart = 2 * torch.finfo(torch.bfloat16).eps
        exact, exact_grad = x.detach().double() @ plain.double().t(), plain.double().sum(0).expand_as(x)
        fine = torch.equal(found, plain)
        fine &= bool((y - exact).norm() <= apart * exact.norm())
        fine &= bool((grad - exact_grad).norm() <= apart * exact_grad.norm())
        wrong += [] if fine else [case]
    assert not wrong


@pytest.fixture(params=[pytest.param(True, id="kernel", marks=pytest.mark.slow), pytest.param(False, id="plain")])
def _kernel_or_none(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not kernel.available():
        pytest.skip("no compiled kernel")
    if not request.param:
        monkeypatch.setattr(kernel, "available", lambda: False)


@pytest.mark.usefixtures("_kernel_or_none")
def test_some_formats() -> None:
    check(FEW)


@pytest.mark.slow
@pytest.mark.usefixtures("_kernel_or_none")
@pytest.mark.parametrize("num_columns", WIDTHS)
def test_every_format(num_columns: int) -> None:
    check([(name, num_columns) for name in OTHERS])


def test_mixed_experts_in_the_dense_lowering() -> None:
    names = ["mxfp4", "int4", "nvfp4"]
    experts = [quantize(weight, name) for name, weight in zip(names, normal(3, NUM_ROWS, 300), strict=True)]
    stack = MixedExperts.from_experts(experts, torch.float32)
    x, offsets = normal(6, 300, seed=1).requires_grad_(), torch.tensor([2, 4, 6], dtype=torch.int32)
    dense = stack.dequantize().double()
    with lowering("dense"):
        compiled = torch.compile(grouped_linear, fullgraph=True)
        for _ in range(2):
            poison()
            y = compiled(x, stack, offsets)
        poison()
        (grad,) = torch.autograd.grad(y.sum(), x)
    expected = torch.cat([x[2 * e : 2 * e + 2].double() @ dense[e].t() for e in range(3)])
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad.double(), dense.sum(1).repeat_interleave(2, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int4@amax", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_rounding_itself(name: str) -> None:
    x = normal(NUM_ROWS, 300)
    compiled = torch.compile(lambda x: fake_quantize(x, name))
    for _ in range(2):
        poison()
        found = compiled(x)
    assert torch.equal(found, fake_quantize(x, name))
