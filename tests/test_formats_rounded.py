"""Few rows against packed weights where the processor has AVX2 and no products of bf16: integers in blocks of 32."""

import pytest
import torch

from aqtx.formats import QuantizedTensor, kernel, quantize
from tests.formats.cases import normal

pytestmark = pytest.mark.skipif(not kernel.available(), reason="no compiled kernel")
NAMES = [
    "int2",
    "int3_asym",
    "int4",
    "int4_g32_asym",
    "int5",
    "int6_asym",
    "int8_row",
    "mxfp4",
    "mxfp6_e2m3",
    "fp4_g64",
]
COLUMNS = [32, 100, 576]


def product(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    return kernel.linear(x, weight.qdata, weight.scales, weight.format, weight.num_columns)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_rounded_by_its_own_largest_value(name: str) -> None:
    """A huge activation costs no other block anything."""
    for num_columns in COLUMNS:
        weight = quantize(normal(6, num_columns), name)
        x, values = normal(3, num_columns, seed=1).bfloat16(), weight.dequantize(torch.float64)
        x[:, 3] = 2.0**13
        exact = x.double() @ values.t()
        blocks = torch.nn.functional.pad(x.double().abs(), (0, -num_columns % 32)).unflatten(1, (-1, 32))
        most = blocks.amax(-1, keepdim=True).expand_as(blocks).flatten(1)[:, :num_columns]
        rounding = (most / 65534) @ values.abs().t()  # half a step of every activation
        sums = 2.0**-20 * (most @ values.abs().t() + most @ torch.ones_like(values.t()) * values.abs().amax())
        allowed = rounding + sums + 2.0**-8 * exact.abs()  # of bf16 answers
        assert ((product(x, weight).double() - exact).abs() <= allowed).all(), num_columns


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_alone_and_in_any_company(name: str) -> None:
    weight, x = quantize(normal(37, 160), name), normal(7, 160, seed=1).bfloat16()
    together = product(x, weight)
    for row in range(7):
        assert torch.equal(product(x[row : row + 1], weight)[0], together[row])
    assert torch.equal(product(x.flip(0), weight), together.flip(0))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so_and_only_there(value: float) -> None:
    weight, x = quantize(normal(5, 64), "int4"), normal(2, 64, seed=1).bfloat16()
    clean = product(x, weight)
    x[0, 40] = value
    found = product(x, weight)
    assert not found[0].isfinite().any()
    torch.testing.assert_close(found[1], clean[1], rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_extreme_activations(scale: float) -> None:
    weight = quantize(normal(5, 64), "int4")
    x = (normal(2, 64, seed=1) * scale).bfloat16()
    exact = x.double() @ weight.dequantize(torch.float64).t()
    error = (product(x, weight).double() - exact).abs()
    assert (error <= 2.0**-7 * exact.abs().amax() + 1e-34).all()
    assert torch.equal(product(torch.zeros_like(x), weight), torch.zeros(2, 5).bfloat16())
