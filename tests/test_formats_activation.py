"""Activations: per token, any format, NaN stays NaN, gradients pass straight through."""

import pytest
import torch

from aqtx.formats import fake_quantize, names
from aqtx.formats.activation import quantize_activation, quantize_activation_grouped
from tests.formats.cases import normal

FORMATS = [*names(), "int4_asym", "int8_row", "int8_row_asym", "mxfp4@search", "mxfp8@rceil", "nvfp4@search"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_does_not_depend_on_the_others(name: str) -> None:
    x = normal(2, 5, 160, dtype=torch.bfloat16)
    alone = torch.stack([quantize_activation(token, name) for token in x.flatten(0, 1)[:, None]]).view_as(x)
    assert torch.equal(quantize_activation(x, name), alone)
    louder = x.clone()
    louder[0, 0] *= 1000
    assert torch.equal(quantize_activation(louder, name)[1], alone[1])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_becomes_nan_in_its_own_token(name: str, value: float) -> None:
    x = normal(3, 64)
    x[1, 7] = value
    out = quantize_activation(x, name)
    assert torch.isnan(out[1, 7])
    assert torch.isfinite(out[[0, 2]]).all()


def test_experts_of_different_formats_in_one_layer() -> None:
    x = normal(9, 64, dtype=torch.bfloat16)
    offsets = torch.tensor([2, 2, 5, 9], dtype=torch.int32)
    out = quantize_activation_grouped(x, offsets, "mxfp8_e4m3,int4,,nvfp4")
    assert torch.equal(out[:2], quantize_activation(x[:2], "mxfp8"))
    assert torch.equal(out[2:5], x[2:5])
    assert torch.equal(out[5:], quantize_activation(x[5:], "nvfp4"))


def test_rows_are_what_the_weight_codec_makes_of_them() -> None:
    x = normal(4, 96)
    assert torch.equal(quantize_activation(x, "int6_g32"), fake_quantize(x, "int6_g32"))


def test_gradients_pass_straight_through() -> None:
    x = normal(4, 64).requires_grad_()
    offsets = torch.tensor([1, 4], dtype=torch.int32)
    (quantize_activation(x, "mxfp4").sum() + quantize_activation_grouped(x, offsets, "int4,").sum()).backward()
    assert x.grad is not None
    assert (x.grad == 2).all()


def test_no_tokens() -> None:
    assert quantize_activation(torch.empty(0, 64), "nvfp4").shape == (0, 64)
    assert quantize_activation(torch.empty(0, 64), "int4_asym").shape == (0, 64)
