"""`rotate: auto`: rotations that are measured to help, chosen together with formats, shared by an input's readers."""

import copy
from functools import cache

import pytest
import torch

import aqtx
from aqtx.errors import InputError
from aqtx.formats import parse
from aqtx.numerics.allocate import allocate
from aqtx.numerics.intervals import clearly_less
from aqtx.planning.rotate import Rotations
from aqtx.program.hadamard_op import OP
from aqtx.program.program import Program
from aqtx.program.weight_changes import Scale
from aqtx.registry import Context
from aqtx.runs.pipeline import Run
from aqtx.runs.recipe import build
from aqtx.sensitivity.rotation import annotation, measure_rotations
from aqtx.sensitivity.rounded_run import Rounding, sequence_losses
from benchmarks.outliers import plant
from tests.rotation_cases import tiny

WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
IDS = torch.randint(0, 96, (8, 64), generator=torch.Generator().manual_seed(0))


def executed(program: Program, *steps: tuple[str, dict]) -> Run:
    run = Run(program, Context(quiet=True, load_calibration=lambda: IDS))
    made = [build(name, fields, name) for name, fields in steps]
    assert [problems for _, problems in made if problems] == []
    run.execute([step for step, _ in made])
    return run


def plan(**own: object) -> tuple[str, dict]:
    settings = {"method": "error", "candidates": ["int4_g32", "int8_g32"], "average_bits": 5.0, "rotate": "auto"}
    return "assign_plan", settings | {"keep": ["router", "lm_head"]} | own


def test_planted_outliers_leave_the_function_and_are_rotated_away():
    program = tiny(**WIDE)
    before = program.module()(IDS[:1])
    plant(program, factor=8.0, share=0.03)
    assert torch.equal(program.module()(IDS[:1]), before)
    activations = {"activations": "int4_g32"}
    run = executed(program, plan(**activations), ("insert_hadamard", {"before": ["plan"]}), ("fuse_hadamard", {}))
    told = run.rows[0].changes.details["rotation"]
    assert told["rotated"] >= 2 and told["inputs"] == 4
    fused = run.rows[2].changes.details["fused"]["heads"]
    assert sum(node.target is OP for node in program.graph.nodes) == told["rotated"] - fused


def test_readers_of_one_input_share_the_choice_and_so_do_experts():
    program = tiny(**WIDE)
    plant(program, factor=8.0, share=0.03)
    executed(program, plan(activations="int4_g32"))
    chosen: dict[object, set] = {}
    for site in program.sites():
        if site.get("format"):
            chosen.setdefault(site.node.args[0].args[0], set()).add(program.plan.sites[site.name].rotation)
    assert {len(blocks) for blocks in chosen.values()} == {1}


def gains(program: Program, categories: tuple[str, ...], activation: str = "none") -> dict[str, list[float]]:
    sites = [site for site in program.sites() if site.category in categories]
    context = Context(quiet=True, load_calibration=lambda: IDS)
    measure_rotations(
        program, [(site, [parse("int4_g32")]) for site in sites], context, block=32, activation=activation
    )
    return {site.name: site.get(annotation(32, activation))["int4_g32"] for site in sites}


def test_scales_that_a_later_weight_undoes_do_not_weigh():
    """The error is that of the block: outputs of up that are 64 times as large and are made small again count alike."""
    program, scaled = tiny(**WIDE), tiny(**WIDE)
    factors = torch.ones(128, dtype=torch.float64)
    factors[::40] = 64.0
    scaled.weights.change("model.layers.0.mlp.experts.up_proj", Scale(factors, outputs=True))
    scaled.weights.change("model.layers.0.mlp.experts.down_proj", Scale(1 / factors))
    assert gains(program, ("mlp_gate", "mlp_up")) == gains(scaled, ("mlp_gate", "mlp_up"))


@pytest.mark.parametrize("own", [{}, {"model_type": "llama", "num_key_value_heads": 2}])
def test_a_run_with_rotations_and_without_rounding_is_the_same_function(own):
    """Those before o are fused into v, heads shared by several queries included; all others run."""
    program = tiny(dtype=torch.float32, **WIDE, **own)
    context = Context(quiet=True, load_calibration=lambda: IDS)
    rounding = Rounding(program, 16, 0, "none")
    turned = {site.node for site in program.sites() if site.category != "router"}
    assert sum(rounding.writer(node) is not None for node in turned) == 1
    plain, rotated = (sequence_losses(rounding, [], nodes, context) for nodes in (set(), turned))
    assert torch.allclose(plain, rotated, rtol=1e-5)


def test_another_choice_needs_a_gain_beyond_twice_its_standard_error():
    losses = torch.tensor([3.0, 4.0, 5.0, 6.0])
    noise = torch.tensor([0.1, -0.1, 0.1, -0.1])
    assert clearly_less(losses - 0.2 + noise, losses)
    assert not clearly_less(losses - 0.05 + noise, losses)
    assert not clearly_less(losses[:1] - 1, losses[:1])


def test_a_rotation_that_spreads_outliers_is_measured_to_help_and_an_inputs_readers_share_the_figure():
    plain, planted = tiny(**WIDE), tiny(**WIDE)
    plant(planted, factor=8.0, share=0.03)
    ratios = []
    for program in (plain, planted):
        [(before, after)] = {
            tuple(error) for error in gains(program, ("attn_q", "attn_k", "attn_v"), "int4_g32").values()
        }
        ratios.append(after / before)
    assert ratios[1] < 0.8 < 0.9 < ratios[0] < 1.1  # random weights without outliers gain nothing


def test_plan_with_rotations_survives_json():
    program = tiny(**WIDE)
    plant(program, factor=8.0, share=0.03)
    executed(program, plan(activations="int4_g32"))
    again = type(program.plan).from_json(program.plan.to_json())
    assert again.sites == program.plan.sites
    assert any(entry.rotation == 32 for entry in again.sites.values())


def test_manual_plans_and_odd_blocks_are_refused():
    _, problems = build("assign_plan", {"method": "manual", "plan": {}, "rotate": "auto", "rotation_block": 52}, "p")
    assert len(problems) == 2 and "rotate auto" in problems[0] and "order 52" in problems[1]


def brute_force(rotations: Rotations, cost: torch.Tensor, size: torch.Tensor, budget: float) -> float:
    best = float("inf")
    inputs, count = rotations.inputs, int(rotations.inputs.max()) + 1
    for mask in range(2**count):
        rotated = torch.tensor([bool(mask >> int(i) & 1) for i in inputs])
        best = min(best, allocate(rotations._cost(cost, rotated), size, budget, exact=True).cost)
    return best


@pytest.mark.parametrize("seed", range(3))
def test_joint_choice_is_close_to_brute_force_and_within_its_own_gap(seed):
    generator = torch.Generator().manual_seed(seed)
    program = tiny(**WIDE)
    sites = [site for site in program.sites() if site.category.startswith(("attn", "mlp"))]
    shape = (len(sites), 3)
    size = torch.tensor([[4.0, 6.0, 8.0]]).repeat(len(sites), 1)
    cost = torch.rand(shape, generator=generator, dtype=torch.float64) * torch.tensor([16.0, 2.0, 0.2])
    plain = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    rotations = Rotations(sites, plain, plain * (0.3 + 1.4 * torch.rand(shape, generator=generator)), 32)
    budget = 5.0 * len(sites)
    found, rotated = rotations.solve(cost, size, lambda joint: allocate(joint, size, budget, exact=True))
    best = brute_force(rotations, cost, size, budget)
    assert found.bound <= best * (1 + 1e-9) and best <= found.cost * (1 + 1e-9)
    assert found.cost <= best * 1.001
    assert found.cost == pytest.approx(float(rotations._cost(cost, rotated)[range(len(sites)), found.choice].sum()))


@cache
def quantized() -> Program:
    program = tiny(**WIDE)
    plant(program, factor=8.0, share=0.03)
    executed(
        program,
        plan(activations="int4_g32"),
        ("insert_hadamard", {"before": ["plan"]}),
        ("fuse_hadamard", {}),
        ("quantize", {}),
        ("emit", {}),
    )
    return program


def test_quantized_checkpoint_with_online_rotations_reloads_bit_for_bit(tmp_path):
    program = copy.deepcopy(quantized())
    expected = program.module()(IDS[:2])
    aqtx.save(program, tmp_path / "out")
    loaded = aqtx.load(tmp_path / "out")
    assert any(node.target is OP for node in loaded.graph.nodes)
    assert torch.equal(loaded.module()(IDS[:2]), expected)


def test_rotating_a_loaded_quantized_checkpoint_is_refused(tmp_path):
    aqtx.save(copy.deepcopy(quantized()), tmp_path / "out")
    loaded = aqtx.load(tmp_path / "out")
    with pytest.raises(InputError, match="is quantized already"):
        executed(loaded, ("insert_hadamard", {"before": ["attn_o"]}))


def test_rounding_before_the_planned_rotations_is_refused():
    program = tiny(**WIDE)
    plant(program, factor=8.0, share=0.03)
    with pytest.raises(InputError, match=r"add `- insert_hadamard: \{before: \[plan\]\}` after `assign_plan`"):
        executed(program, plan(activations="int4_g32"), ("quantize", {}))
