"""The tensor subclass by itself: copies, moves, state dicts, files, slices, and what it refuses."""

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from aqtx.formats import QuantizedTensor, quantize
from tests.formats.cases import mixed, normal, weight_of

NAMES = ["mxfp4", "mxfp6", "mxfp8@rceil", "nvfp4", "int3_asym", "int4_g32", "int8_row", "fp8", "bf16"]


class Holder(nn.Module):
    """A module whose parameters are packed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_of(name, 48, 128), requires_grad=False)
        self.experts = nn.Parameter(mixed(), requires_grad=False)

    def values(self) -> list[torch.Tensor]:
        return [self.weight.dequantize(), self.experts.dequantize()]


def assert_same(module: Holder, expected: Holder) -> None:
    assert all(torch.equal(a, b) for a, b in zip(module.values(), expected.values(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_state_dicts(name: str) -> None:
    module = Holder(name)
    assert_same(copy.deepcopy(module), module)
    other = Holder(name)
    other.weight = nn.Parameter(quantize(torch.zeros(48, 128, dtype=torch.bfloat16), name), requires_grad=False)
    other.load_state_dict(module.state_dict())
    assert_same(other, module)
    empty = copy.deepcopy(module).to("meta")
    assert empty.weight.is_meta and empty.experts.is_meta
    empty.load_state_dict(module.state_dict(), assign=True)
    assert_same(empty, module)


@pytest.mark.parametrize("name", NAMES)
def test_torch_save_loads_weights_only(name: str) -> None:
    module, file = Holder(name), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = Holder(name)
    loaded.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert_same(loaded, module)


@pytest.mark.parametrize("name", NAMES)
def test_safetensors_hold_the_disk_layout(name: str, tmp_path: Path) -> None:
    made = weight_of(name, 3, 16, 100)
    save_file(made.to_disk(), tmp_path / "weight.safetensors")
    parts = load_file(tmp_path / "weight.safetensors")
    back = QuantizedTensor.from_disk(parts, made.format_name, tuple(made.shape), made.dtype)
    assert torch.equal(back.dequantize(), made.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_dtype_is_what_the_weight_stands_for(name: str) -> None:
    made = weight_of(name, 8, 128)
    as_float = made.to(torch.float32)
    assert as_float.dtype is torch.float32
    assert torch.equal(as_float.dequantize(), made.dequantize(torch.float32))
    if name != "bf16":
        assert torch.equal(as_float.qdata, made.qdata)
    assert made.to("cpu").dtype is torch.bfloat16
    assert made.to("meta").device.type == "meta"
    assert Holder(name).to(torch.float32).experts.dtype is torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_experts_and_rows_can_be_sliced(name: str) -> None:
    made = weight_of(name, 4, 16, 128)
    dense = made.dequantize()
    assert torch.equal(made[2].dequantize(), dense[2])
    assert torch.equal(made[1:3].dequantize(), dense[1:3])
    assert torch.equal(made[:, 4:9].dequantize(), dense[:, 4:9])
    assert torch.equal(made[3][5:].dequantize(), dense[3, 5:])
    picked = made.index_select(0, torch.tensor([3, 0]))
    assert torch.equal(picked.dequantize(), dense[[3, 0]])


def test_what_is_not_handled_is_refused_by_name() -> None:
    made = weight_of("mxfp4", 4, 16, 128)
    for attempt in (lambda: made[..., 3:5], lambda: made[0][0], lambda: made + 1, lambda: made.transpose(0, 1)):
        with pytest.raises(NotImplementedError, match=r"aten"):
            attempt()


def test_an_inner_tensor_is_found_by_its_documented_name() -> None:
    assert weight_of("mxfp4", 4, 64).scale.dtype is torch.uint8
    assert weight_of("int4", 4, 64).scale.dtype is torch.bfloat16
    assert weight_of("int4_asym", 4, 64).zero_point.dtype is torch.uint8
    assert weight_of("nvfp4", 3, 4, 64).per_tensor_scale.shape == (3, 1, 1)
    assert weight_of("bf16", 4, 64).scale is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_a_linear_is_the_product_with_the_dequantized_weight(name: str, num_rows: int) -> None:
    made = weight_of(name, 48, 160)
    bias = normal(48)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = normal(2, num_rows, 160, seed=1).to(dtype)
        y = F.linear(x, made, bias.to(dtype))
        assert y.dtype is dtype
        exact = F.linear(x.double(), made.dequantize(torch.float64), bias.to(dtype).double())
        # products are exact in float32; what remains is the output's own rounding, and the weight's in bf16 and fp16
        assert (y - exact).norm() <= 3 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_input_and_the_bias(name: str) -> None:
    made, x, bias = weight_of(name, 48, 128).to(torch.float32), normal(3, 7, 128), normal(48)
    x.requires_grad_()
    bias.requires_grad_()
    F.linear(x, made, bias).square().sum().backward()
    other, other_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    F.linear(other, made.dequantize(), other_bias).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(bias.grad, other_bias.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rule", ["amax", "search"])
def test_what_is_stored_does_not_depend_on_the_default_rule(rule: str) -> None:
    """A folder written while `int4` meant another rule says `int4` with that rule's scales: read as they are."""
    made = quantize(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)), "int4", scale_rule=rule)
    read = QuantizedTensor(made.qdata, "int4", 256, made.dtype, made.scale)
    assert torch.equal(read.scale, made.scale)
    assert torch.equal(read.dequantize(), made.dequantize())
