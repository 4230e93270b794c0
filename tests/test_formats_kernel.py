"""The compiled kernel against plain torch, and what happens when there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aqtx.formats import kernel, parse, quantize
from aqtx.formats.codec import choose_scales, encode
from aqtx.formats.packing import memory_bytes
from tests.formats.cases import DTYPES, MX, boundary_values, every_finite, normal

needs_kernel = pytest.mark.skipif(not kernel.available(), reason="no compiled kernel")
NAMES = [
    *MX,
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int8",
    "int4_g32",
    "int8_row_asym",
    "int3_asym",
    "int5_asym",
    "int6_asym",
    "fp6_g64",
    "nvfp4",
]
COLUMNS = [128, 576, 100, 33, 1000]


@needs_kernel
@pytest.mark.parametrize("name", NAMES)
def test_linears_of_every_shape(name: str) -> None:
    for num_columns in COLUMNS:
        made = quantize(normal(37, num_columns), name)
        dense = made.dequantize(torch.float64)
        for num_rows in (1, 2, 3, 7, 15, 33):
            for dtype in DTYPES:
                x = normal(num_rows, num_columns, seed=1).to(dtype)
                y = kernel.linear(x, made.qdata, made.scales, made.format, num_columns).double()
                exact = x.double() @ dense.t()
                assert (y - exact).norm() <= 3 * torch.finfo(dtype).eps * exact.norm(), (num_columns, num_rows, dtype)


@needs_kernel
def test_many_rows_of_a_weight_larger_than_a_panel() -> None:
    made, x = quantize(normal(1100, 1000), "int4_asym"), normal(2, 40, 1000, seed=1).bfloat16()
    y = kernel.linear(x, made.qdata, made.scales, made.format, 1000)
    exact = x.double() @ made.dequantize(torch.float64).t()
    assert y.shape == exact.shape
    assert (y - exact).norm() <= 3 * torch.finfo(torch.bfloat16).eps * exact.norm()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "search"])
@pytest.mark.parametrize("name", MX)
def test_quantizing_is_bit_equal_to_plain_torch(name: str, rule: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "serves", lambda device: False)  # `quantize_mx` itself does not ask
    fmt = parse(name, scale_rule=rule)
    edges = boundary_values(fmt.element.name, dtype)
    spread = normal(16, 100) * torch.exp2(8 * normal(16, 100, seed=1))
    tiny = normal(4, 64) * torch.finfo(dtype).smallest_normal
    values = every_finite(dtype).view(-1, 32)[::7] if dtype is not torch.float32 else normal(8, 32) * 3e38
    largest = torch.finfo(dtype).max
    for weight in (edges[: len(edges) // 32 * 32].view(-1, 32), spread, tiny, values, torch.zeros(2, 40)):
        weight = weight.float().clamp(-largest, largest).to(dtype)
        expected = encode(weight, fmt, choose_scales(weight, fmt))
        row_bytes = memory_bytes(weight.shape[-1], fmt.element.bits)
        codes, scale = kernel.quantize_mx(weight, fmt, row_bytes)
        assert torch.equal(scale, expected.scale)
        assert torch.equal(codes, expected.qdata)


LESSER = """
import sys, pytest, torch
from aqtx.formats import kernel
assert kernel.available() and torch.ops.aqtx_cpu.cpu() <= int(sys.argv[1])
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[2], "-k", sys.argv[3]]))
"""
EVERY_CASE = "every_shape or bit_equal"
SOME = f"({EVERY_CASE}) and (int3_asym or nvfp4 or mxfp6_e2m3 and floor)"


@needs_kernel
@pytest.mark.parametrize(
    ("cpu", "level", "cases"),
    [
        ("avx2", 1, SOME),
        *(
            pytest.param(cpu, level, EVERY_CASE, marks=pytest.mark.slow)
            for level, cpu in enumerate(["baseline", "avx2", "avx512"])
        ),
    ],
    ids=["avx2-some", "baseline", "avx2", "avx512"],
)
def test_code_for_lesser_processors(cpu: str, level: int, cases: str) -> None:
    """The same tests in the code that a processor without AVX-512, or without its BF16, would run."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "AQTX_CPU": cpu}
    command = [sys.executable, "-c", LESSER, str(level), __file__, cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


CHECK = """
import torch
from aqtx.formats import kernel, quantize
assert not kernel.available()
made = quantize(torch.randn(8, 64), "mxfp4")
x = torch.randn(3, 64)
torch.testing.assert_close(torch.nn.functional.linear(x, made), x @ made.dequantize().t())
"""


@pytest.mark.parametrize(
    ("setting", "notices"),
    [({"CXX": "/nonexistent/g++"}, 1), pytest.param({"AQTX_KERNEL": "off"}, 0, marks=pytest.mark.slow)],
)
def test_without_a_compiler_one_line_says_so(setting: dict[str, str], notices: int, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "AQTX_CACHE_DIR": str(tmp_path), **setting}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stderr.splitlines() if "no compiled CPU kernel" in line]) == notices
