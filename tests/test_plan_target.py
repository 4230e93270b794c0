"""`assign_plan: {target: ...}`: what a program fuses or lacks is a constraint of the plan."""

import re
from pathlib import Path

import pytest
import torch

import aqtx
from aqtx.checkpoint.exports.clients import CLIENTS
from aqtx.checkpoint.exports.run import export
from aqtx.checkpoint.exports.target import captured
from aqtx.checkpoint.open import open_program
from aqtx.cli import main
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.emit import Emit
from aqtx.passes.gptq import Gptq
from aqtx.passes.quantize import Quantize
from aqtx.program.program import Program
from aqtx.registry import Context, Pass
from tests.foreign_models import foreign
from tests.model_cases import oracle
from tests.tiny import write_checkpoint


def test_a_model_that_the_target_does_not_take_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    """vLLM and transformers load the experts of gpt-oss in one tensor a layer, which compressed-tensors has not."""
    oracle("gpt-oss").config.save_pretrained(tmp_path)
    program = open_program(tmp_path, torch.float32, config_only=True)
    for target, refused in (("vllm", True), ("transformers", True), ("llama.cpp", False), ("aqtx", False)):
        plan = AssignPlan(method="uniform", candidates=("int4_g16",), target=target)  # type: ignore[arg-type]
        problems = [problem for problem in plan.misfits(program) if "gpt_oss in one tensor a layer" in problem]
        assert len(problems) == refused


@pytest.mark.parametrize("command", ["check", "plan", "apply"])
def test_what_an_export_will_have_to_be_given_is_a_warning(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No tokenizer, which a template may bring; a family that aqtx cannot tell llama.cpp of."""
    words = ["quickstart", f"output={tmp_path / 'out'}", "evaluate=null", "report=false"]
    words += ["passes=[{assign_plan: {method: uniform, candidates: [int8_g32], target: llama.cpp}}, quantize, emit]"]
    oracle("llama", intermediate_size=64).save_pretrained(tmp_path / "known")
    assert main([command, *words, f"model.source={tmp_path / 'known'}"]) == 0
    told = capsys.readouterr().err
    assert told.count("target llama.cpp") == 1 and "no tokenizer.json: give a GGUF file" in told
    foreign("phi", intermediate_size=64).save_pretrained(tmp_path / "phi")
    words[1] += "2"
    assert main([command, *words, f"model.source={tmp_path / 'phi'}"]) == 0
    told = capsys.readouterr().err
    assert told.count("target llama.cpp") == 1 and "aqtx writes no GGUF of model_type 'phi'" in told


@pytest.fixture(scope="module")
def program() -> Program:
    return aqtx.trace("tinymoe")


@pytest.mark.parametrize("target", ["vllm", "llama.cpp", "transformers"])
def test_a_plan_for_a_target_has_one_format_where_it_fuses(target: str) -> None:
    planned = aqtx.trace("tinymoe")
    step = AssignPlan(method="error", target=target, candidates=("int4_g32", "int8_g32", "int6_row"), average_bits=6.0)
    planned = aqtx.run(planned, [step])
    assert planned.plan is not None
    formats = {name: entry.format for name, entry in planned.plan.sites.items()}
    for pattern in CLIENTS[target].alike:
        for members in captured(pattern, formats).values():
            assert len({formats[name] for name in members}) == 1
    assert len({name for name in formats.values() if name}) == (1 if target == "transformers" else 2)
    assert CLIENTS[target].unlike(formats) == []


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"target": "vllm", "candidates": ("mxfp4", "mxfp6")}, r"target vllm has no form for mxfp6_e2m3.*is int6"),
        ({"target": "llama.cpp", "candidates": ("mxfp4", "mxfp8")}, r"target llama.cpp has no form for mxfp8.*is int8"),
        ({"target": "llama.cpp", "candidates": ("mxfp4", "nvfp4")}, r"target llama.cpp has no form for nvfp4.*NaN"),
        (
            {"target": "vllm", "candidates": ("int4",), "keep": ("re:experts.3", "attention", "lm_head", "router")},
            r"vllm: the experts of a layer share one format, but",
        ),
    ],
)
def test_what_a_target_forbids_is_told_before_anything_is_measured(keys: dict, says: str, program: Program) -> None:
    problems = AssignPlan(method="error", average_bits=4.5, **keys).misfits(program)
    assert re.search(says, " ".join(problems)), problems


@pytest.mark.parametrize(
    "fused",
    [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        ("mlp.experts.3.w1", "mlp.experts.7.w2"),
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),  # DeepSeek
        ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),  # Qwen3.5
        ("linear_attn.in_proj_a", "linear_attn.in_proj_b"),
    ],
)
def test_matrices_that_vllm_makes_one_need_one_format(fused: tuple[str, ...]) -> None:
    """By its `packed_modules_mapping` of each family; the same projections of two layers may differ."""
    client = CLIENTS["vllm"]
    alike = {f"model.layers.{layer}.{name}": ("int4_g32", "int8_row")[layer] for name in fused for layer in (0, 1)}
    assert client.unlike(alike) == []
    for other in ("int8_row", None):
        assert len(client.unlike({**alike, f"model.layers.0.{fused[0]}": other})) == 1


def test_the_budget_counts_what_the_target_loads(program: Program) -> None:
    """INT3 takes 4.5 bits in GGUF, so that 4 bits are too few for it there and enough elsewhere."""
    keys = {"method": "error", "candidates": ("int3",), "average_bits": 4.0}
    assert "is below the smallest possible, 4.5000" in AssignPlan(target="llama.cpp", **keys).misfits(program)[0]
    assert not [p for p in AssignPlan(**keys).misfits(program) if "below" in p]


def test_a_plan_for_vllm_uses_its_budget() -> None:
    """Four layers with a format each: the sizes of groups between 2 and 6 bits fill 99 % of any budget."""
    planned = aqtx.trace("tinymoe")
    for method in ("error", "random"):
        for bits in (2.6, 3.5, 4.6, 5.1, 6.0, 6.4):
            AssignPlan(method=method, target="vllm", average_bits=bits).run(planned, Context())
            assert planned.plan is not None and 0.99 * bits <= planned.plan.average_bits <= bits


@pytest.mark.parametrize("rounding", [Quantize(), Gptq()], ids=["quantize", "gptq"])
def test_matrices_that_vllm_fuses_share_nvfp4s_scale_per_matrix(rounding: Pass, tmp_path: Path) -> None:
    """vLLM takes the largest of theirs and only warns, so that they must be one, and all values lie below it."""
    source = write_checkpoint(tmp_path / "source")
    plan = AssignPlan(method="uniform", target="vllm", candidates=("nvfp4",), keep=("lm_head", "router"))
    context = Context(load_calibration=lambda: torch.randint(0, 100, (8, 32)))
    program = aqtx.trace(source)
    for step in (plan, rounding, Emit()):
        step.run(program, context)
    for pattern in CLIENTS["vllm"].shared_scale:
        for members in captured(pattern, program.codes).values():
            scales = [program.codes[name].per_tensor_scale.item() for name in members]
            sites = [site for site in program.sites() if site.name in members]
            largest = max(float(program.read(site).abs().max()) for site in sites)
            assert len(members) > 1 and set(scales) == {max(scales)}
            assert max(scales) == pytest.approx(largest / (448 * 6), rel=1e-6)
    aqtx.save(program, tmp_path / "q")
    assert "vllm" in export(tmp_path / "q", "compressed-tensors", tmp_path / "out").clients
