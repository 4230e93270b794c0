"""Rotating passes keep the function in float64, on every architecture and entry, and survive saving."""

import json

import pytest
import torch

import aqtx
from aqtx.formats import quantize
from aqtx.program.edits import Hadamard, QuantizeActivation
from aqtx.program.hadamard_op import OP
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.runs.pipeline import Run
from aqtx.runs.recipe import build
from aqtx.runs.resume_points import restore_state, save_state
from aqtx.runs.verify import compare, probe_batch, probe_outputs
from tests.rotation_cases import ARCHITECTURES, FUSED, SMALL, rotated, rotations, tiny


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_function_is_kept_to_float64_rounding(model_type):
    program = tiny(model_type)
    ids = probe_batch(program, 7)
    before = probe_outputs(program, ids)
    run = rotated(program)
    found = compare(before, probe_outputs(program, ids), depth=30)
    assert max(found.largest, found.router) < 1e-10 and found.rerouted == 0
    assert all(row.max_difference < row.tolerance < 1e-10 for row in run.rows)
    after = probe_outputs(program, ids)
    assert all(torch.equal(one, other) for one, other in zip(before.chosen, after.chosen, strict=True))
    layers = SMALL["num_hidden_layers"]
    assert run.rows[-1].changes.details["fused"]["heads"] == layers
    assert len(rotations(program)) == layers * (1 + (model_type == "qwen2_moe")) + (model_type == "deepseek") * 1


def test_function_is_kept_in_float32_too():
    program = tiny(dtype=torch.float32)
    ids = probe_batch(program, 7)
    before = probe_outputs(program, ids, torch.float32)
    rotated(program)
    found = compare(before, probe_outputs(program, ids, torch.float32), depth=30, dtype=torch.float32)
    assert found.largest < found.tolerance and found.rerouted == 0


def test_weights_are_rounded_once_however_often_they_changed():
    """Folding and two rotations in float64, then one rounding: at most half a unit in the last place from exact."""
    program = tiny()
    rotated(program)
    for site in program.sites():
        exact = program.weights.precise(site.weight, site.expert, dtype=torch.float64)
        stored = program.weights.matrix(site.weight, site.expert)
        assert torch.equal(stored, exact.to(torch.bfloat16)), site.name
        assert torch.equal(program.read(site), exact.float()), site.name


def generated(program: Program, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the step entry: a prompt, then token by token."""
    layers, heads = SMALL["num_hidden_layers"], SMALL["num_key_value_heads"]
    size = SMALL["hidden_size"] // SMALL["num_attention_heads"]
    cache = [torch.zeros(len(ids), heads, 32, size, dtype=program.dtype) for _ in range(2 * layers)]
    step, start = program.module("step"), torch.zeros(len(ids), dtype=torch.long)
    with torch.no_grad():
        parts = [step(ids[:, :5], torch.arange(5), start, cache)]
        parts += [step(ids[:, at : at + 1], torch.tensor([at]), start, cache) for at in range(5, ids.shape[1])]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("traced_first", [True, False])
def test_generation_entry_computes_the_same(traced_first):
    """The step graph replays the edits, whether it was traced before or after them; its cache holds rotated values."""
    program = tiny(dtype=torch.float32)
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    before = program.module()(ids)
    if traced_first:
        program.entry("step")
    rotated(program)
    assert (generated(program, ids) - before).abs().max() < 1e-5 * before.abs().max()


def test_saved_and_loaded_bit_for_bit_with_the_nodes_that_stay(tmp_path):
    program = tiny("llama")
    rotated(program)
    ids = torch.randint(0, 96, (2, 9))
    expected = program.module()(ids)
    aqtx.save(program, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    loaded = aqtx.load(tmp_path / "out")
    assert torch.equal(loaded.module()(ids), expected)
    assert len(rotations(loaded)) == len(rotations(program)) > 0


def test_resumed_program_has_the_same_weights(tmp_path):
    program = tiny("llama")
    rotated(program, FUSED[:3])
    save_state(program, [], tmp_path)
    fresh = tiny("llama")
    restore_state(fresh, tmp_path)
    for one in (program, fresh):
        rotated(one, FUSED[3:])
    names = program.weights.names()
    assert fresh.weights.names() == names
    assert all(torch.equal(fresh.weights.get(name), program.weights.get(name)) for name in names)


def test_rotation_stands_before_the_quantization_of_activations():
    program = tiny()
    weight = "model.layers.0.mlp.experts.down_proj"
    program.edit(QuantizeActivation(weight=weight, formats=("mxfp4",)))
    program.edit(Hadamard(weight=weight, block=32, seed=0))
    [node] = [site.node for site in program.sites() if site.weight == weight and site.expert == 0]
    quantized = node.args[0]
    assert quantized.target is torch.ops.aqtx.quantize_activation.default
    assert quantized.args[0].target is OP and quantized.args[0].args[0].target is torch.ops.aten.mul.Tensor


@pytest.mark.parametrize("rounding", ["quantize", "gptq"])
def test_rotated_weights_are_not_rounded_to_bfloat16_before_they_are_quantized(rounding):
    """int8 in groups of 32 is as fine as bfloat16: rounding twice moves codes, and scales, which plain GPTQ keeps."""
    program, moved = tiny(), 0
    settings = {} if rounding == "quantize" else {"search_scales": False, "sweeps": 0}
    plan = ("assign_plan", {"method": "uniform", "candidates": ["int8_g32"], "keep": ["router", "lm_head"]})
    ids = torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(2))
    run = Run(program, Context(seed=3, quiet=True, load_calibration=lambda: ids))
    run.execute([build(name, fields, name)[0] for name, fields in (*FUSED, plan, (rounding, settings))])
    for site in program.sites():
        if site.name in program.codes:
            precise, found = program.read(site), program.codes[site.name]
            once, twice = (quantize(W, "int8_g32") for W in (precise, precise.bfloat16()))
            assert found.dtype is torch.bfloat16
            assert torch.equal(found.scale, once.scale), site.name
            assert rounding == "gptq" or torch.equal(found.codes(), once.codes()), site.name
            moved += int((once.scale != twice.scale).sum())
    assert moved > 100
