"""Moments collected from the graph against hooks on the module; blocks, waves, streams, gate scores."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aqtx.blockwise.block_runner import Runner, Want, waves_of
from aqtx.blockwise.block_stream import Stream
from aqtx.blockwise.input_moments import Moments, add_outer, mirror
from aqtx.checkpoint.open import trace
from aqtx.program.blocks import evaluate, split_blocks
from aqtx.program.edits import QuantizeActivation
from aqtx.program.gate_scores import find_gate_scores, is_inside_experts
from aqtx.program.program import Program
from tests.tiny import random_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return random_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def program(model) -> Program:
    return trace(model)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 192, (6, 20), generator=torch.Generator().manual_seed(0))


def blocks_of(program: Program):
    return split_blocks(program.graph, program.weights.specs)


def runner_of(program: Program, ids: torch.Tensor, folder: Path | None = None) -> Runner:
    runner = Runner(program, Stream(3, folder), CPU)
    runner.start(ids, 2)
    return runner


def planned(program: Program):
    return [site for site in program.sites() if site.layer is not None and site.category != "router"]


def moe_inputs(model: nn.Module, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each layer: tokens [T, H] into the mixture, chosen experts [T, k], their scores [T, k]."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def look(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        tokens = arguments[0].flatten(0, -2)
        scores, experts = F.linear(tokens, module.gate.weight).softmax(-1).topk(2)
        seen.append((tokens, experts, scores))

    handles = [block.mlp.register_forward_pre_hook(look) for block in model.model.layers]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def test_blocks_are_the_layers_and_compose_to_the_model(program, model, ids) -> None:
    blocks = blocks_of(program)
    assert [block.layer for block in blocks] == [None, 0, 1, None]
    names = [{str(node.target) for node in block.parameters} for block in blocks]
    assert {"lm_head.weight", "model.norm.weight"} <= names[-1] and "model.embed_tokens.weight" in names[0]
    assert all(".layers.1." in name for name in names[2] if name in program.weights.specs)
    runner = runner_of(program, ids)
    for block in blocks:
        runner.advance(block, runner.load(block))
    [output] = program.graph.output_node().all_input_nodes
    logits = torch.cat([runner.stream.read(batch, CPU)[output] for batch in range(3)])
    with torch.no_grad():
        assert torch.equal(logits, torch.cat([model(batch) for batch in ids.split(2)]))


def test_only_the_residual_stream_and_constants_cross(program) -> None:
    for block in blocks_of(program)[1:3]:
        carried = [node.meta["val"].shape for node in block.inputs if "val" in node.meta]
        assert sum(len(shape) == 3 for shape in carried) == 1  # [B, S, H]


def test_waves_go_attention_gate_up_down(program) -> None:
    block = blocks_of(program)[1]
    waves = waves_of(block, [site for site in planned(program) if site.layer == 0])
    names = [[{node.args[1].target.split(".")[-2:][-1] for node in stage.sites} for stage in wave] for wave in waves]
    assert names == [[{"weight"}], [{"weight"}], [{"gate_proj", "up_proj"}], [{"down_proj"}]]
    assert [len(stage.sites) for wave in waves for stage in wave] == [3, 1, 2, 1]


def test_moments_equal_those_of_hooks(program, model, ids) -> None:
    runner = runner_of(program, ids)
    truth = moe_inputs(model, ids)
    for block in blocks_of(program)[:3]:
        weights = runner.load(block)
        for wave in waves_of(block, [site for site in planned(program) if site.layer == block.layer]):
            for stage in wave:
                if stage.offsets is None or is_inside_experts(stage.source, stage.offsets, block.nodes):
                    continue
                want = Want(stage, Moments.empty(stage.experts, stage.num_inputs, CPU))
                runner.collect(block, weights, [want])
                tokens, experts, _ = truth[block.layer]
                for expert in range(4):
                    rows = tokens[(experts == expert).any(1)]
                    assert want.moments.tokens[expert] == len(rows)
                    assert torch.allclose(want.moments.H[expert], rows.T @ rows, rtol=1e-4, atol=1e-4)
                assert torch.allclose(want.moments.largest, tokens.abs().amax(0))
        runner.advance(block, weights)


@pytest.mark.parametrize("power", [1, 2])
def test_gate_scores_weigh_the_right_rows(program, model, ids, power) -> None:
    runner = runner_of(program, ids)
    blocks = blocks_of(program)
    runner.advance(blocks[0], runner.load(blocks[0]))
    stage = waves_of(blocks[1], [site for site in planned(program) if site.layer == 0])[2][0]
    scores = find_gate_scores(stage.offsets, blocks[1].nodes, power)
    want = Want(stage, Moments.empty([1], stage.num_inputs, CPU), scores)
    runner.collect(blocks[1], runner.load(blocks[1]), [want])
    tokens, experts, gate = moe_inputs(model, ids)[0]
    chosen = experts == 1
    c = (gate * chosen).sum(1)[chosen.any(1)] ** power
    rows, num_tokens = tokens[chosen.any(1)], c.sum() ** 2 / (c**2).sum()
    assert torch.allclose(want.moments.tokens[0], num_tokens, rtol=1e-4)
    expected = (rows * c[:, None]).T @ rows / c.sum() * num_tokens
    assert torch.allclose(want.moments.H[0], expected, rtol=1e-4, atol=1e-4)


def test_stream_on_disk_is_the_stream_in_memory(program, ids, tmp_path) -> None:
    kept = []
    for folder in (None, tmp_path):
        runner = runner_of(program, ids, folder)
        for block in blocks_of(program)[:3]:
            runner.advance(block, runner.load(block))
        kept.append([runner.stream.read(batch, CPU) for batch in range(3)])
    for memory, disk in zip(*kept, strict=True):
        assert memory.keys() == disk.keys()
        for node, value in memory.items():
            assert value == disk[node] if isinstance(value, int) else torch.equal(value, disk[node])
    assert len(list(tmp_path.iterdir())) == 2  # one residual stream, the first batch in memory


def test_evaluate_drops_what_nobody_reads(program, ids) -> None:
    block = blocks_of(program)[0]
    runner = runner_of(program, ids)
    values = {**runner.stream.read(0, CPU), **runner.load(block)}
    kept = evaluate(block.nodes, values, block.later, device=CPU)
    assert values.keys() <= set(block.later) and kept.keys() == set(block.later)


def test_outer_products_in_panels() -> None:
    rows = torch.randn(30, 1100, generator=torch.Generator().manual_seed(0))
    H = torch.zeros(1100, 1100)
    add_outer(H, rows)
    mirror(H)
    assert torch.allclose(H, rows.T @ rows, atol=1e-3)


def test_activation_quantization_is_in_effect(model, ids) -> None:
    """A planned activation format puts a node before the linear; its output is what is measured."""
    program = trace(model)
    for name in ("gate_proj", "up_proj"):
        weight = f"model.layers.0.mlp.experts.{name}"
        program.edit(QuantizeActivation(weight=weight, formats=("mxfp4",) * 4))
    blocks = blocks_of(program)
    stage = waves_of(blocks[1], [site for site in planned(program) if site.layer == 0])[2][0]
    assert stage.source.target is torch.ops.aqtx.quantize_activation.default and len(stage.sites) == 2
    runner = runner_of(program, ids)
    runner.advance(blocks[0], runner.load(blocks[0]))
    want = Want(stage, Moments.empty([0], stage.num_inputs, CPU))
    runner.collect(blocks[1], runner.load(blocks[1]), [want])
    tokens, experts, _ = moe_inputs(model, ids)[0]
    rows = torch.ops.aqtx.quantize_activation(tokens[(experts == 0).any(1)], "mxfp4")
    assert torch.allclose(want.moments.H[0], rows.T @ rows, rtol=1e-4, atol=1e-4)
