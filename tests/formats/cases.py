"""Inputs and independent oracles of the format tests."""

import gfloat
import gfloat.formats as gf
import numpy as np
import torch
from torch import Tensor

from aqtx.formats import MixedExperts, QuantizedTensor, quantize

ORACLE = {
    "e2m1": gf.format_info_ocp_e2m1,
    "e2m3": gf.format_info_ocp_e2m3,
    "e3m2": gf.format_info_ocp_e3m2,
    "e4m3": gf.format_info_ocp_e4m3,
    "e5m2": gf.format_info_ocp_e5m2,
}
MX = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"]
INTS = ["int2", "int3", "int4", "int5", "int6", "int8"]
FLOATS = ["fp4", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2"]
K_QUANTS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
# every row of the table but K-quants, every group size, both symmetries, every rule
EVERY = [
    *MX, *(f"{name}@{rule}" for name in MX for rule in ("even", "rceil", "search")),
    *INTS, *(f"{name}{group}{asym}" for name in INTS for group in ("_g32", "_row", "_g64") for asym in ("", "_asym")),
    *(f"{name}_asym" for name in INTS), *(f"{name}@amax" for name in ("int2", "int3", "int4")),
    *(f"{name}@search" for name in ("int4", "int6", "int8", "int4_asym", *FLOATS)),
    *FLOATS, *(f"{name}_g32" for name in FLOATS), "nvfp4", "nvfp4@search", "bf16",
]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def oracle_values(element: str) -> np.ndarray:
    """Value of every code of an element, by gfloat."""
    info = ORACLE[element]
    return gfloat.decode_ndarray(info, np.arange(2**info.k))


def oracle_round(element: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """(values, codes) nearest to `values`, ties to even, saturating, by gfloat."""
    info = ORACLE[element]
    rounded = gfloat.round_ndarray(info, values.double().numpy(), sat=True)
    codes = gfloat.encode_ndarray(info, rounded)
    return torch.from_numpy(np.asarray(rounded)).float(), torch.from_numpy(np.asarray(codes).astype(np.uint8))


def boundary_values(element: str, dtype: torch.dtype) -> Tensor:
    """Every value of an element, every midpoint, and their neighbours in `dtype`; both signs."""
    finite = np.unique(np.abs(oracle_values(element)[np.isfinite(oracle_values(element))]))
    middles = (finite[1:] + finite[:-1]) / 2
    points = torch.from_numpy(np.concatenate([finite, middles, finite[-1:] * 1.5])).to(dtype)
    infinity = torch.tensor(float("inf"), dtype=dtype)
    points = torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])
    tiny = torch.tensor([torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal / 2, 0.0], dtype=dtype)
    points = torch.cat([points, tiny]).float()
    return torch.cat([points, -points])


def every_finite(dtype: torch.dtype) -> Tensor:
    """All finite values of a 16-bit dtype."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(dtype)
    return values[torch.isfinite(values)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decibels(weight: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise."""
    weight = weight.double()
    return float(10 * torch.log10(weight.square().sum() / (approximation.double() - weight).square().sum()))


MIX = ["mxfp4", "nvfp4", "bf16", "int4_asym", "mxfp4"]


def weight_of(name: str, *shape: int) -> QuantizedTensor:
    return quantize(normal(*shape, dtype=torch.bfloat16), name)


def mixed(num_rows: int = 64, num_columns: int = 128) -> MixedExperts:
    """Quantized experts of three formats and a plain one, out of order."""
    weights = normal(len(MIX), num_rows, num_columns, dtype=torch.bfloat16).unbind(0)
    experts = [quantize(weight, name) for weight, name in zip(weights, MIX, strict=True)]
    return MixedExperts.from_experts([*experts, normal(num_rows, num_columns, dtype=torch.bfloat16)], torch.bfloat16)
