"""Decoding of every code at every stored scale: the compiled kernel gives what plain torch gives, bit for bit."""

import pytest
import torch
from torch import Tensor

from aqtx.formats import QuantizedTensor, kernel, parse
from aqtx.formats.packing import pack
from aqtx.formats.part_shapes import layout
from aqtx.formats.table import BF16_SCALE
from tests.formats.cases import DTYPES, FLOATS, INTS, MX

needs_kernel = pytest.mark.skipif(not kernel.available(), reason="no compiled kernel")
NAMES = [*MX, *FLOATS, *(f"{name}{end}" for name in INTS for end in ("", "_asym")), "nvfp4", "int4_g32", "int8_row"]


def every_scale(name: str) -> Tensor:
    """All stored scales of a format, NaN and infinity among them; every 16th of bf16's."""
    if parse(name).scale is BF16_SCALE:
        return torch.arange(-(2**15), 2**15, 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return torch.arange(256).to(torch.uint8)


def every_code(name: str, num_columns: int) -> QuantizedTensor:
    """A row per scale that holds every code; the last block is ragged."""
    fmt, stored = parse(name), every_scale(name)
    shape = (len(stored), num_columns)
    codes = torch.arange(num_columns).remainder(2**fmt.element.bits).to(torch.uint8).expand(shape)
    scale = stored[:, None].repeat(1, fmt.num_blocks(num_columns))
    wanted, extras = layout(fmt, shape, on_disk=False), {}
    if "zero_point" in wanted:
        extras["zero_point"] = (torch.arange(scale.numel()) % 2**fmt.element.bits).to(torch.uint8).view(scale.shape)
    if "per_tensor_scale" in wanted:
        extras["per_tensor_scale"] = torch.full((1, 1), 1e36)
    return QuantizedTensor(pack(codes, fmt.element.bits), fmt.name, num_columns, torch.float32, scale, **extras)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_and_torch_agree_to_the_bit(name: str, dtype: torch.dtype) -> None:
    made = every_code(name, 300)
    expected = made.dequantize(dtype)
    found = kernel.dequantize(made.qdata, made.scales, made.format, made.num_columns, dtype)
    integer = torch.int32 if dtype is torch.float32 else torch.int16
    nans = expected.isnan()
    assert torch.equal(found.isnan(), nans)
    same = (found.view(integer) == expected.contiguous().view(integer)) | nans
    assert same.all(), (found[~same][:4], expected[~same][:4])
