"""Quantizing what was dequantized changes nothing, in the dtype that holds it."""

import pytest
import torch
from torch import Tensor

from aqtx.formats import fake_quantize, quantize
from tests.formats.cases import DTYPES, normal

INTS = ["int8_asym", "int8_row_asym", "int8_g32_asym", "int8_asym@search", "int6_asym", "int8"]
NAMES = [*INTS, "nvfp4", "nvfp4@search"]


def draws() -> dict[str, Tensor]:
    """Weights of several shapes of distribution [128, 512], one-sided and with outliers."""
    normals, flat = normal(128, 512), torch.rand(128, 512, generator=torch.Generator().manual_seed(1))
    return {"normal": normals, "shifted": normals + 0.7, "outliers": normals / flat.clamp_min(1e-3), "flat": flat}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_once_more_is_the_same(name: str, dtype: torch.dtype) -> None:
    changed = {}
    for kind, weight in draws().items():
        for size in (0.02, 1.0, 30.0):
            once = quantize((weight * size).clamp(-6e4, 6e4).to(dtype), name).dequantize()
            again = quantize(once, name).dequantize()
            changed[kind, size] = int((again != once).sum())
            assert torch.equal(fake_quantize(once, name), again)
    assert not any(changed.values()), changed
