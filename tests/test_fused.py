"""What a package fuses before it is compiled, against the same graph as it was."""

import pytest
import torch
from torch import fx, nn

from aqtx.formats import kernel, quantize
from aqtx.formats.joined import join_rows, layout_of
from aqtx.program.fuse_linears import fuse_linears
from aqtx.program.hadamard_op import OP as HADAMARD
from aqtx.program.hadamard_op import buffers
from aqtx.program.site import LINEAR
from tests.formats.cases import normal

pytestmark = pytest.mark.skipif(not kernel.available(), reason="no compiled kernel")
ROWS = (40, 24, 7)  # of the matrices: the last is no multiple of what the kernel takes at once


def linears(formats: list[str], *, biases: str = "", rotated: bool = False) -> fx.GraphModule:
    """x [M, 64] -> one product per format; those named in `biases` ("012") have one; a rotation before each."""
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    for name, value in buffers(32, None, torch.float32).items():
        root.register_buffer(name, value)
    made = []
    for index, name in enumerate(formats):
        weight = quantize(normal(ROWS[index], 64, seed=index), name)
        root.register_parameter(f"w{index}", nn.Parameter(weight, requires_grad=False))
        arguments = [x, graph.get_attr(f"w{index}")]
        if rotated:
            factors = [graph.get_attr(buffer) for buffer in buffers(32, None, torch.float32)]
            arguments[0] = graph.call_function(HADAMARD, (x, factors[0], *factors[1:]))
        if str(index) in biases:
            root.register_parameter(f"b{index}", nn.Parameter(normal(ROWS[index], seed=9 + index), requires_grad=False))
            arguments.append(graph.get_attr(f"b{index}"))
        made.append(graph.call_function(LINEAR, tuple(arguments)))
    graph.output(tuple(made))
    return fx.GraphModule(root, graph)


def count(module: fx.GraphModule, target: object) -> int:
    return sum(node.target is target for node in module.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["mxfp4", "int4", "int4_g32", "int3_asym", "int8_row", "mxfp8", "fp6_g64"])
def test_joined_rows_multiply_to_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """Few rows: each output is one row's sum. Many go through a matrix product, whose sums may be in another order."""
    module = linears([name] * 3)
    x = normal(5, 64, seed=7).to(dtype)
    before = [module(x[:rows]) for rows in (1, 2, 5)]
    many = module(normal(70, 64).to(dtype))
    assert fuse_linears(module) == 2 and count(module, LINEAR) == 1
    assert sorted(name for name, _ in module.named_parameters()) == ["joined_0"]
    for rows, parts in zip((1, 2, 5), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(module(x[:rows]), parts, strict=True))
    for part, reference in zip(module(normal(70, 64).to(dtype)), many, strict=True):
        assert (part - reference).norm() <= 2 * torch.finfo(dtype).eps * reference.norm()


def test_only_what_agrees_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(2, 64)

    def fused(module: fx.GraphModule) -> int:
        before = module(x)
        fewer = fuse_linears(module)
        assert all(torch.equal(a, b) for a, b in zip(module(x), before, strict=True))
        return fewer

    assert fused(linears(["int4", "mxfp4", "int4"])) == 1
    assert fused(linears(["int4", "mxfp4", "int8"])) == 0
    assert fused(linears(["int4"] * 3, biases="012")) == 2
    assert fused(linears(["int4"] * 3, biases="1")) == 1
    assert fused(linears(["nvfp4"] * 2)) == 0, "matrices with other scales per matrix"
    assert fused(linears(["q4_k"] * 2)) == 0, "the kernel does not decode it"
    tied = linears(["int4"] * 2)
    [first, _] = [node for node in tied.graph.nodes if node.op == "get_attr" and node.target.startswith("w")]
    [results] = next(iter(reversed(tied.graph.nodes))).args
    next(iter(reversed(tied.graph.nodes))).args = ((*results, first),)
    assert fuse_linears(tied) == 0, "a matrix with another reader would be kept twice"


def test_equal_rotations_of_one_input_are_shared() -> None:
    module = linears(["int4"] * 3, rotated=True)
    x = normal(3, 64)
    before = module(x)
    assert count(module, HADAMARD) == 3
    assert fuse_linears(module) == 2
    assert count(module, HADAMARD) == 1 and count(module, LINEAR) == 1
    assert all(torch.equal(a, b) for a, b in zip(module(x), before, strict=True))


def test_a_joined_matrix_is_the_rows_of_its_parts() -> None:
    parts = [quantize(normal(rows, 96, seed=rows), "int3_asym") for rows in ROWS]
    joined = join_rows(parts)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert layout_of(joined) == layout_of(parts[0]) and layout_of(torch.ones(2, 2)) is None
