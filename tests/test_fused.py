"""What a package fuses before it is compiled, against the same graph as it was."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from aqtx.checkpoint.open import open_program
from aqtx.formats import MixedExperts, dequantized, kernel, quantize
from aqtx.formats.chosen_experts import described
from aqtx.formats.joined import join_rows, layout_of
from aqtx.program.cache_spec import of_graph
from aqtx.program.fuse_experts import fuse_experts
from aqtx.program.fuse_linears import fuse_linears
from aqtx.program.hadamard_op import OP as HADAMARD
from aqtx.program.hadamard_op import buffers
from aqtx.program.run_ops import traced
from aqtx.program.site import GROUPED_LINEAR, LINEAR
from tests.formats.cases import normal
from tests.quantized_folders import quantized
from tests.tiny import write_checkpoint

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


def stacks(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Gate, up and down of five experts: in one format, plain, or each expert in another."""
    shapes = [(5, 48, 64), (5, 48, 64), (5, 64, 48)]
    plain = [normal(*shape, seed=index).to(dtype) / 8 for index, shape in enumerate(shapes)]
    if name == "plain":
        return plain
    if name != "mixed":
        return [quantize(stack, name) for stack in plain]
    formats = ("int4", "mxfp4", None, "int3_asym", "int4")
    return [
        MixedExperts.from_experts([e if f is None else quantize(e, f) for e, f in zip(s, formats, strict=True)], dtype)
        for s in plain
    ]


def summed(x: Tensor, weights: Tensor, chosen: Tensor, three: list[Tensor]) -> Tensor:
    """The definition in float64."""
    gate, up, down = (dequantized(stack, torch.float64) for stack in three)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for weight, e in zip(weights[token].double(), chosen[token], strict=True):
            out[token] += weight * (down[e] @ (F.silu(gate[e] @ row) * (up[e] @ row)))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["mxfp4", "int4_asym", "nvfp4", "plain", "mixed"])
def test_experts_are_what_their_definition_says(name: str, dtype: torch.dtype) -> None:
    """One token, few, and so many that some experts have more rows than are few.

    Numbers are rounded to the model's dtype at most three times: a hidden state (to integers), an inner value, the sum,
    by half a unit in the last place each. In float32 sums of 64 and 48 products also lose half a unit a product, the
    square root of so many in the mean.
    """
    allowed = 1.5 if dtype is torch.bfloat16 else 1.5 + (64**0.5 + 48**0.5) / 2
    three = stacks(name, dtype)
    made = described(*three)
    assert made is not None
    for num_tokens in (1, 3, 130):
        x = normal(num_tokens, 64, seed=num_tokens).to(dtype)
        weights, chosen = normal(num_tokens, 5).softmax(-1).to(dtype).topk(2)
        arguments = (made.parts, made.specs, made.slots, made.buckets, made.inner)
        found = torch.ops.aqtx_cpu.experts(x, weights, chosen, *arguments)
        exact = summed(x, weights, chosen, three)
        assert found.dtype is dtype and found.shape == x.shape
        assert (found - exact).norm() <= allowed * torch.finfo(dtype).eps * exact.norm(), num_tokens


def test_experts_that_do_not_fit_are_refused() -> None:
    made = described(*stacks("mxfp4", torch.float32))
    assert made is not None
    x, weights, chosen = normal(2, 64), torch.ones(2, 2), torch.tensor([[0, 1], [4, 2]])
    rest = (made.specs, made.slots, made.buckets, made.inner)
    run = torch.ops.aqtx_cpu.experts
    with pytest.raises(RuntimeError, match="no expert 5"):
        run(x, weights, chosen + 1, made.parts, *rest)
    with pytest.raises(RuntimeError, match="experts take"):
        run(x, weights[:1], chosen, made.parts, *rest)
    with pytest.raises(RuntimeError, match=r"experts must be|codes must be"):
        run(x, weights, chosen, made.parts[::-1], *rest)
    assert run(x[:0], weights[:0], chosen[:0], made.parts, *rest).shape == (0, 64)
    assert described(*(quantize(normal(2, 32, 32), "q4_k") for _ in range(3))) is None


def test_a_models_experts_are_found_and_compute_the_same(tmp_path: Path) -> None:
    """In float32, where the two differ by the order of sums alone."""
    plan = {"*.mlp.experts.[01].*": "mxfp4", "*.1.mlp.experts.2.*": "int4_asym", "*.self_attn.*": "int8"}
    program = open_program(quantized(write_checkpoint(tmp_path / "w"), tmp_path / "q", plan), torch.float32)
    specs, ids = of_graph(program.entry("step")), torch.arange(12).view(2, 6)

    def stepped(module: nn.Module) -> Tensor:
        cache, start = [spec.make(2, 8, torch.device("cpu")) for spec in specs], torch.tensor([0, 2])
        parts = [module(ids[:, at], torch.arange(6)[at], start, cache) for at in (slice(0, 5), slice(5, 6))]
        return torch.cat(parts, 1)[:, 2:]

    module = program.module("step")
    assert isinstance(module, fx.GraphModule)
    before = stepped(module)
    for node in module.graph.nodes:
        node.target = traced(node.target)
    assert fuse_linears(module) == 4, "q, k and v of two layers"
    assert fuse_experts(module) == 2
    assert count(module, GROUPED_LINEAR) == 0 and count(module, torch.ops.aten.sort.stable) == 0
    assert not [name for name, _ in module.named_parameters() if "gate_proj" in name]
    torch.testing.assert_close(stepped(module), before, rtol=1e-4, atol=1e-4)


def test_experts_of_another_kind_stay_as_they_are(tmp_path: Path) -> None:
    program = open_program(quantized(write_checkpoint(tmp_path / "w"), tmp_path / "q", {"*.experts.*": "int4"}), None)
    for change in (torch.ops.aten.gelu.default, torch.ops.aten.relu.default):
        module = program.module("score")
        assert isinstance(module, fx.GraphModule)
        [first, *_] = [node for node in module.graph.nodes if node.target is torch.ops.aten.silu.default]
        first.target = change
        assert fuse_experts(module) == 1 and count(module, GROUPED_LINEAR) == 3
