"""Graphs with packed weights: compile, export, decompositions, ahead-of-time packages, no stale kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aqtx.formats import activation, kernel, one_row, quantize
from aqtx.formats.grouped_linear import grouped_linear
from tests.formats.cases import mixed, normal

NAMES = ["mxfp4", "nvfp4", "int3_asym", "mxfp6", "int8_row", "bf16"]


class Block(nn.Module):
    """A linear, an activation node and a grouped linear, all packed."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(quantize(normal(128, 64, dtype=torch.bfloat16), name), requires_grad=False)
        self.experts = nn.Parameter(mixed(), requires_grad=False)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        y = F.linear(activation.quantize_activation(x, "mxfp8_e4m3"), self.weight)
        return grouped_linear(torch.relu(y), self.experts, offsets)


X = normal(12, 64, seed=1).bfloat16()
OFFSETS = torch.tensor([2, 2, 3, 9, 9, 12], dtype=torch.int32)
FEWER = torch.tensor([1, 1, 1, 4, 4, 5], dtype=torch.int32)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal within bf16 roundings of the intermediate and the result, which fusing may do at other places."""
    assert (actual.double() - expected.double()).norm() <= 4 * torch.finfo(
        torch.bfloat16
    ).eps * expected.double().norm()


def check_compiled(name: str) -> None:
    module = Block(name)
    expected, fewer = module(X, OFFSETS), module(X[:5], FEWER)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert_close(compiled(X, OFFSETS), expected)
        assert_close(compiled(X[:5], FEWER), fewer)


def test_compile_whole_graph_and_dynamic() -> None:
    check_compiled("mxfp4")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_compile_every_kind_of_format(name: str) -> None:
    check_compiled(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp4", "int3_asym", "nvfp4"])
def test_compiled_training_step(name: str) -> None:
    module = Block(name)
    x, other = X.clone().requires_grad_(), X.clone().requires_grad_()
    module(other, OFFSETS).float().sum().backward()
    torch.compile(module, fullgraph=True, dynamic=True)(x, OFFSETS).float().sum().backward()
    assert_close(x.grad, other.grad)


SLOW = pytest.mark.slow  # a format or two show the mechanism; the rest differ in arithmetic only


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["mxfp4", *(pytest.param(name, marks=SLOW) for name in NAMES[1:])])
def test_export_and_decompositions(name: str, strict: bool) -> None:
    module = Block(name)
    expected = module(X, OFFSETS)
    with torch.no_grad():
        program = torch.export.export(
            module, (X, OFFSETS), dynamic_shapes=({0: torch.export.Dim("t")}, None), strict=strict
        )
    assert torch.equal(program.module()(X, OFFSETS), expected)
    assert_close(program.run_decompositions().module()(X[:5], FEWER), module(X[:5], FEWER))
    assert {type(part).__name__ for part in program.state_dict.values()} == {"QuantizedTensor", "MixedExperts"}


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int3_asym", "int4_g32", "int8_row", "mxfp6", "fp8", "int2_g64"])
def test_one_row_in_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "available", lambda: False)
    for num_columns in (128, 256, 192, 96):
        made = quantize(normal(16, num_columns), name)
        x = normal(1, 1, num_columns)
        assert one_row.fits(made) or num_columns in (96, 192)
        torch.testing.assert_close(F.linear(x, made), F.linear(x, made.dequantize()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("hash_follows", [True, False])
def test_a_changed_lowering_is_not_served_stale(
    hash_follows: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The compile cache must tell the code behind the dispatch apart; the control shows that it would not by itself."""
    from aqtx.formats import packed_linear, tensor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    made, x = quantize(normal(16, 64), "mxfp4"), normal(3, 64)
    plain = F.linear(x, made.dequantize())

    def compiled() -> Tensor:
        torch._dynamo.reset()
        with torch.no_grad():
            return torch.compile(lambda x, w: F.linear(x, w), fullgraph=True)(x, made)

    torch.testing.assert_close(compiled(), plain)
    lower = packed_linear.lower
    monkeypatch.setattr(packed_linear, "lower", lambda x, weight, bias: 2 * lower(x, weight, bias))
    if hash_follows:
        monkeypatch.setattr(tensor, "SOURCE_HASH", "the code changed")
    torch.testing.assert_close(compiled(), 2 * plain if hash_follows else plain)


LOAD = """
import sys, torch
from aqtx.formats import kernel
kernel.available()
import aqtx.formats.activation, aqtx.formats.mixed, aqtx.formats.tensor
run = torch._inductor.aoti_load_package(sys.argv[1])
x, offsets, expected = torch.load(sys.argv[2], weights_only=True)
error = (run(x, offsets).double() - expected.double()).norm() / expected.double().norm()
sys.exit(float(error) > 0.03)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp4", "int3_asym"])
def test_ahead_of_time_package_in_another_process(name: str, tmp_path: Path) -> None:
    module = Block(name)
    with torch.no_grad():
        program = torch.export.export(module, (X, OFFSETS), dynamic_shapes=({0: torch.export.Dim("t")}, None))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
    torch.save((X[:5], FEWER, module(X[:5], FEWER)), tmp_path / "inputs.pt")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", LOAD, package, str(tmp_path / "inputs.pt")]
    assert subprocess.run(command, check=False, env=environment).returncode == 0
