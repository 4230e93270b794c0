"""Conversion to and from torchao's tensors, bit for bit."""

import pytest
import torch

from aqtx.errors import InputError
from aqtx.formats import from_torchao, quantize, register_safetensors, to_torchao
from aqtx.formats.torchao_base import import_quietly
from tests.formats.cases import MX, normal


@pytest.mark.parametrize("shape", [(16, 128), (3, 16, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*MX, "mxfp4@even", "mxfp8@search", "nvfp4"])
def test_there_and_back(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made = quantize(normal(*shape, dtype=dtype), name)
    theirs = to_torchao(made)
    assert theirs.shape == made.shape and theirs.dtype == dtype
    back = from_torchao(theirs, scale_rule=made.format.rule)
    assert back.format_name == made.format_name
    assert torch.equal(back.qdata, made.qdata) and torch.equal(back.scale, made.scale)
    # torchao multiplies NVFP4's scales in the other order, one float32 rounding apart
    tolerance = 2**-22 if name == "nvfp4" and dtype is torch.float32 else 0
    torch.testing.assert_close(theirs.dequantize(), made.dequantize(), rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", MX)
def test_their_own_tensors_convert(name: str) -> None:
    mx = import_quietly("torchao.prototype.mx_formats.mx_tensor")
    weight = normal(16, 128)
    theirs = mx.MXTensor.to_mx(weight, to_torchao(quantize(weight, name)).elem_dtype, 32)
    assert torch.equal(from_torchao(theirs).dequantize(), theirs.dequantize())
    assert torch.equal(from_torchao(theirs).qdata, quantize(weight, name).qdata)


def test_an_nvfp4_tensor_without_an_outer_scale() -> None:
    nvfp4 = import_quietly("torchao.prototype.mx_formats.nvfp4_tensor")
    theirs = nvfp4.NVFP4Tensor.to_nvfp4(normal(16, 128))
    assert torch.equal(from_torchao(theirs).dequantize(), theirs.dequantize())


@pytest.mark.parametrize(
    ("name", "columns", "says"), [("fp8_e4m3", 128, "only INT, MX and NVFP4"), ("mxfp4", 100, "whole blocks")]
)
def test_what_torchao_cannot_hold_is_refused(name: str, columns: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        to_torchao(quantize(normal(4, columns), name))


def test_a_plain_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="only torchao's"):
        from_torchao(torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["mxfp6", "int3_asym", "nvfp4"])
def test_torchao_safetensors_helpers_round_trip(name: str) -> None:
    register_safetensors()
    support = import_quietly("torchao.prototype.safetensors.safetensors_support")
    made = quantize(normal(16, 128), name)
    tensors, metadata = support.flatten_tensor_state_dict({"layer.weight": made})
    restored, left = support.unflatten_tensor_state_dict(tensors, metadata)
    assert not left
    assert restored["layer.weight"].format_name == made.format_name
    assert torch.equal(restored["layer.weight"].dequantize(), made.dequantize())
