"""GPTQ of very large and very small numbers: other units, same answer."""

import pytest
import torch

from aqtx.formats import quantize
from aqtx.numerics.gptq import gptq
from tests.test_gptq import assert_same_codes, exact_errors, moment, weights

FORMATS = ["int4", "int4_asym", "int3", "mxfp4", "nvfp4", "fp8"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [63, 90, -90])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_in_other_units_get_the_same_codes(name: str, power: int, dtype: torch.dtype) -> None:
    """Powers of two change no code, as everything is arithmetic in float32."""
    W, H = weights(24, 128).to(dtype), moment(200, 128)
    expected = gptq(W, H, name)
    found = gptq(W * 2.0**power, H, name)
    if name != "nvfp4":  # its scale per matrix is rounded in between
        assert torch.equal(found.qdata, expected.qdata)
    ours = exact_errors(W, found.dequantize().double() * 2.0**-power, H)
    nearest = exact_errors(W, quantize(W * 2.0**power, name).dequantize().double() * 2.0**-power, H)
    assert (ours <= nearest * (1 + 1e-5)).all()
    assert ours.sum() < 0.9 * nearest.sum()


@pytest.mark.parametrize("power", [100, 118, -100])
def test_hessians_in_other_units_get_the_same_codes(power: int) -> None:
    W, H = weights(2, 24, 128), moment(200, 128, 2)
    tokens = torch.tensor([200, 200])
    for prior in (None, moment(500, 128, seed=5) / 500):
        options = {"num_tokens": tokens, "prior": prior}
        scaled = {"num_tokens": tokens, "prior": None if prior is None else prior * 2.0**power}
        assert_same_codes(gptq(W, H * 2.0**power, "int4", **scaled), gptq(W, H, "int4", **options))
    assert_same_codes(gptq(W, H * 2.0**power, "int4"), gptq(W, H, "int4"))
    mixed = torch.stack([H[0] * 2.0**power, H[1]])
    assert_same_codes(gptq(W, mixed, "int4", order="activation"), gptq(W, H, "int4", order="activation"))
