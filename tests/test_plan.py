"""`assign_plan` and the annotations it reads, on small models: budgets, limits, methods, refusals."""

import csv
import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import aqtx
from aqtx.errors import InputError
from aqtx.formats import fake_quantize, parse
from aqtx.numerics import allocate, alpha_hill
from aqtx.passes.annotate_alpha import AnnotateAlpha
from aqtx.passes.annotate_error import AnnotateError
from aqtx.passes.assign_plan import AssignPlan
from aqtx.program.accounting import kept_bytes, original_bytes
from aqtx.program.plan import Plan
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.runs.pipeline import run
from aqtx.schema import parse_fields
from aqtx.sensitivity.alpha import COLUMNS, alpha_csv
from tests.tiny import OLMOE, write_checkpoint

EXPERTS = 24  # 2 layers x 4 experts x 3 projections, all of 128 x 64 weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plan") / "model")


@pytest.fixture(scope="module")
def annotated(folder: Path) -> Program:
    return run(aqtx.trace(folder), [AnnotateAlpha(), AnnotateError(formats=("mxfp4", "mxfp6", "mxfp8"))])


def planned(program: Program, **fields: Any) -> Plan:
    step = AssignPlan(**{"method": "alpha", **fields})
    assert step.validate() == []
    step.run(program, Context(quiet=True))
    assert program.plan is not None
    return program.plan


def formats(plan: Plan) -> Counter[str | None]:
    return Counter(entry.format for entry in plan.sites.values())


def test_alpha_is_that_of_the_weights(annotated: Program) -> None:
    for site in annotated.sites()[::7]:
        W = annotated.read(site)
        assert site.get("alpha") == pytest.approx(alpha_hill(W, spectra="farms"), rel=1e-6)
        assert site.get("alpha_info")["raw"] == pytest.approx(alpha_hill(W), rel=1e-6)


def test_errors_are_those_of_the_formats(annotated: Program) -> None:
    site = annotated.sites()[9]
    W = annotated.read(site)
    for name in ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"):
        Q = fake_quantize(W.bfloat16(), parse(name)).double()
        expected = float((W.double() - Q).square().sum() / W.double().square().sum())
        assert site.get("error")[name] == pytest.approx(expected, rel=1e-9)


def test_alpha_csv_has_the_known_columns(annotated: Program) -> None:
    rows = list(csv.DictReader(io.StringIO(alpha_csv(annotated))))
    assert tuple(rows[0]) == COLUMNS
    assert [row["layer_name"] for row in rows] == [site.name for site in annotated.sites()]
    expert = next(row for row in rows if row["layer_name"].endswith("experts.1.down_proj"))
    assert (expert["category"], expert["shape"], expert["numel"]) == ("mlp_down", "128x64", "8192")
    assert (expert["k_used"], expert["n_eigs"]) == ("12", "128")


def test_average_bits_counts_the_planned_sites_with_their_scales(annotated: Program) -> None:
    plan = planned(annotated, average_bits=5.0)
    assert plan.average_bits == 5.0 and plan.gap == 0
    assert set(formats(plan)) == {None, "mxfp4", "mxfp6_e2m3"} and len(plan.planned) == EXPERTS
    for name, entry in plan.planned.items():
        assert entry.bytes == parse(entry.format or "").num_bytes((128, 64)), name
        assert entry.alpha and entry.error and entry.cost


def test_budget_bytes_counts_every_stored_tensor(annotated: Program) -> None:
    total = sum(spec.numel * 2 for spec in annotated.weights.specs.values())
    kept = total - EXPERTS * 128 * 64 * 2
    plan = planned(annotated, budget_bytes=kept + EXPERTS * 128 * 64 * 5 // 8)
    assert plan.average_bits == 5.0
    assert (
        sum(entry.bytes for entry in plan.sites.values()) + _not_sites(annotated) == kept + EXPERTS * 128 * 64 * 5 // 8
    )


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    config = {key: value for key, value in OLMOE.items() if "expert" not in key}
    program = aqtx.trace(write_checkpoint(tmp_path, config | {"model_type": "llama", "tie_word_embeddings": True}))
    assert program.tied() == {"lm_head.weight"}
    matrices = sum(site.numel * 2 for site in program.sites() if site.category != "lm_head")
    norms_and_embedding = (5 * 128 + 192 * 128) * 2
    assert kept_bytes(program, program.sites()) == norms_and_embedding
    assert original_bytes(program) == norms_and_embedding + matrices


def _not_sites(program: Program) -> int:
    sites = {site.weight for site in program.sites()}
    return sum(spec.numel * 2 for name, spec in program.weights.specs.items() if name not in sites)


def test_alpha_costs_are_the_documented_formula(annotated: Program) -> None:
    plan = planned(annotated, average_bits=5.0, gamma=1.5)
    sites = [site for site in annotated.sites() if site.name in plan.planned]
    logs = torch.tensor([site.get("alpha") for site in sites], dtype=torch.float64).log()
    spread = 1.4826 * (logs - logs.quantile(0.5)).abs().quantile(0.5)
    weight = torch.exp(-1.5 * ((logs - logs.quantile(0.5)) / spread).clamp(-3, 3))
    energy = torch.stack([annotated.read(site).double().square().sum() for site in sites])
    table = [[site.get("error")[name] for name in ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3")] for site in sites]
    cost = torch.tensor(table, dtype=torch.float64) * (weight * energy)[:, None]
    size = torch.tensor([[4352.0, 6400.0, 8448.0]]).repeat(EXPERTS, 1)
    found = allocate(cost, size, EXPERTS * 8192 * 5 / 8, exact=True)
    assert plan.cost == pytest.approx(found.cost, rel=1e-9)
    assert [entry.cost for entry in plan.planned.values()] == pytest.approx(
        cost.gather(1, found.choice[:, None]).flatten().tolist()
    )


def test_gamma_zero_is_the_error_method(annotated: Program) -> None:
    zero, error = (planned(annotated, average_bits=4.8, **kw) for kw in ({"gamma": 0.0}, {"method": "error"}))
    assert [entry.format for entry in zero.sites.values()] == [entry.format for entry in error.sites.values()]


@pytest.mark.parametrize("direction", ["low_alpha_high_bits", "high_alpha_high_bits"])
def test_direction_decides_who_gets_the_bits(annotated: Program, direction: str) -> None:
    plan = planned(annotated, average_bits=5.0, gamma=8.0, direction=direction)
    mean = {
        fmt: sum(e.alpha or 0 for e in plan.planned.values() if e.format == fmt) / formats(plan)[fmt]
        for fmt in ("mxfp4", "mxfp6_e2m3")
    }
    assert (mean["mxfp4"] > mean["mxfp6_e2m3"]) == (direction == "low_alpha_high_bits")


def test_ratio_gives_three_monotone_tiers(annotated: Program) -> None:
    for direction in ("low_alpha_high_bits", "high_alpha_high_bits"):
        plan = planned(annotated, method="ratio", mxfp4_ratio=0.3, bf16_ratio=0.1, direction=direction)
        assert formats(plan) == {"mxfp4": 7, "mxfp8_e4m3": 15, "bf16": 2, None: 11}
        ordered = sorted(plan.planned.values(), key=lambda e: e.alpha or 0, reverse=direction != "low_alpha_high_bits")
        assert [e.format for e in ordered] == ["bf16"] * 2 + ["mxfp8_e4m3"] * 15 + ["mxfp4"] * 7


def test_threshold_parts_at_one_alpha(annotated: Program) -> None:
    alphas = sorted(site.get("alpha") for site in annotated.sites() if "experts" in site.name)
    border = (alphas[9] + alphas[10]) / 2
    plan = planned(annotated, method="threshold", alpha_threshold=border, candidates=("int4", "int8"))
    assert {e.format for e in plan.planned.values() if (e.alpha or 0) < border} == {"int8"}
    assert formats(plan)["int8"] == 10


def test_front_back_follows_the_depth(annotated: Program) -> None:
    plan = planned(annotated, method="front_back", half="back")
    assert {e.format for name, e in plan.planned.items() if ".layers.0." in name} == {"mxfp4"}
    assert {e.format for name, e in plan.planned.items() if ".layers.1." in name} == {"mxfp8_e4m3"}
    filled = planned(annotated, method="front_back", average_bits=5.0)
    assert [e.format for e in filled.planned.values()] == ["mxfp8_e4m3"] * 4 + ["mxfp4"] * 20


def test_uniform_takes_the_largest_that_fits(annotated: Program) -> None:
    for bits, name in ((4.25, "mxfp4"), (6.3, "mxfp6_e2m3"), (9.0, "mxfp8_e4m3")):
        assert formats(planned(annotated, method="uniform", average_bits=bits)) == {None: 11, name: EXPERTS}
    assert formats(planned(annotated, method="uniform", candidates=("int3",)))["int3"] == EXPERTS


def test_random_is_seeded(annotated: Program) -> None:
    first, again, other = (planned(annotated, method="random", average_bits=5.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_alphaq_counts_nominal_bits_per_matrix(annotated: Program) -> None:
    plan = planned(annotated, method="alphaq", average_bits=5.0)
    bits = [parse(entry.format or "").element.bits for entry in plan.planned.values()]
    assert sum(bits) / len(bits) <= 5.0
    assert plan.average_bits == 5.25  # the scales come on top


def test_constraints(annotated: Program) -> None:
    plan = planned(
        annotated,
        average_bits=6.0,
        keep=("attention", "router"),
        pins={"lm_head": "int8_row", "*.layers.0.mlp.experts.1.up_proj": "bf16"},
        min_bits={"mlp_down": 6},
        max_bits={"re:experts\\.0\\.(up|gate)": 4},
    )
    assert all(entry.format != "mxfp4" for name, entry in plan.planned.items() if name.endswith("down_proj"))
    small = [entry.format for name, entry in plan.planned.items() if "experts.0." in name and "down" not in name]
    assert small == ["mxfp4"] * 4
    assert plan.sites["lm_head"].format == "int8_row" and plan.sites["lm_head"].why == "pinned"
    assert plan.sites["model.layers.0.mlp.experts.1.up_proj"].format == "bf16"
    assert (plan.average_bits or 9) <= 6.0


def test_limits_that_contradict_name_the_site(annotated: Program) -> None:
    with pytest.raises(InputError, match="leave none of the candidates"):
        planned(annotated, average_bits=6.0, min_bits={"mlp_down": 6}, max_bits={"*.experts.0.*": 4})


@pytest.mark.parametrize("groups", [("qkv", "gate_up"), ("experts",), ("vllm",), ("re:layers\\.(\\d+)\\.",)])
def test_groups_share_a_format(annotated: Program, groups: tuple[str, ...]) -> None:
    plan = planned(annotated, average_bits=5.6, keep=("router", "lm_head"), groups=groups)
    shared: dict[tuple[str, ...], set[str | None]] = {}
    for name, entry in plan.planned.items():
        layer, part = name.partition(".layers.")[2][:1], name
        if groups[0].startswith("re:"):
            shared.setdefault((layer,), set()).add(entry.format)
        if "experts" in groups or "vllm" in groups:
            shared.setdefault((layer, "experts") if "experts" in part else (part,), set()).add(entry.format)
        if "qkv" in groups or "vllm" in groups:
            fused = part.replace("up_proj", "gate_proj").replace("k_proj", "q_proj").replace("v_proj", "q_proj")
            shared.setdefault((fused,), set()).add(entry.format)
    assert all(len(found) == 1 for found in shared.values())


def test_active_costs_count_an_expert_by_its_share(annotated: Program) -> None:
    """lm_head is read by every token, an expert by half of them: 2 of 4."""
    plan = planned(annotated, average_bits=5.0, keep=("attention", "router"), cost_model="active")
    read = {name: entry.bytes * (0.5 if "experts" in name else 1) for name, entry in plan.planned.items()}
    weights = sum(entry.numel * (0.5 if "experts" in name else 1) for name, entry in plan.planned.items())
    assert 4.8 < sum(read.values()) * 8 / weights <= 5.0


def test_active_costs_refuse_what_storage_would_allow(annotated: Program) -> None:
    """With lm_head at mxfp8 and all experts at mxfp4, what a token reads has more bits a weight than what is stored."""
    pinned = {"keep": ("attention", "router"), "pins": {"lm_head": "mxfp8"}}
    head = next(site.numel for site in annotated.sites() if site.name == "lm_head")
    experts = EXPERTS * 128 * 64
    stored, read = ((8.25 * head + share * 4.25 * experts) / (head + share * experts) for share in (1.0, 0.5))
    between = (stored + read) / 2
    planned(annotated, average_bits=between, cost_model="storage", **pinned)
    with pytest.raises(InputError, match=f"smallest possible, {read:.4f}"):
        planned(annotated, average_bits=between, cost_model="active", **pinned)


def test_the_plan_survives_json_and_marks_the_sites(annotated: Program) -> None:
    plan = planned(annotated, average_bits=5.0, activations="mxfp8")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    for site in annotated.sites():
        entry = plan.sites[site.name]
        assert (site.get("format"), site.get("activation")) == (entry.format, entry.activation)
        assert entry.activation == ("mxfp8_e4m3" if entry.format else None)
        assert entry.format or entry.why.startswith("kept by '")


def test_weights_are_not_touched(annotated: Program) -> None:
    planned(annotated, average_bits=5.0)
    assert annotated.weights.written() == {} and len(annotated.codes) == 0


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "method fisher needs average_bits or budget_bytes."),
        ({"average_bits": 5.0, "budget_bytes": 9}, "average_bits and budget_bytes are both given; exactly one is."),
        (
            {"method": "ratio", "average_bits": 5.0},
            "method ratio takes no average_bits: its own fields decide the size.",
        ),
        ({"average_bits": 5.0, "candidates": ("mxpf4",)}, "unknown format 'mxpf4', did you mean 'mxfp4'?"),
        ({"average_bits": 5.0, "activations": "fp9"}, "unknown format 'fp9'"),
        (
            {"average_bits": 5.0, "groups": ("qvk",)},
            "groups: 'qvk' is none of qkv, gate_up, experts, vllm nor `re:...`",
        ),
        ({"average_bits": 5.0, "groups": ("re:abc",)}, "captures nothing"),
        ({"average_bits": 5.0, "gamma": -1.0}, "gamma is negative; set direction to reverse it."),
        ({"method": "manual"}, "plan, a JSON file or its content, goes with method manual and only with it."),
        ({"method": "threshold"}, "method threshold needs alpha_threshold."),
        (
            {"method": "alphaq", "budget_bytes": 10**6},
            "method alphaq counts nominal bits per matrix: give average_bits.",
        ),
        ({"average_bits": -1.0}, "average_bits is not positive."),
    ],
)
def test_bad_fields_are_told_without_a_model(fields: dict[str, Any], sentence: str) -> None:
    assert any(sentence in problem for problem in AssignPlan(**fields).validate())


def test_fields_come_from_yaml(annotated: Program) -> None:
    values = {"method": "alpha", "candidates": ["mxfp4", "int8"], "average_bits": 5, "pins": {"lm_head": "int8"}}
    made, problems = parse_fields(AssignPlan, values, "passes.1.assign_plan")
    assert problems == [] and made is not None and made.average_bits == 5.0
    _, problems = parse_fields(AssignPlan, {"method": "alfa", "averagebits": 5}, "p")
    assert any("averagebits: unknown key, did you mean 'average_bits'" in problem for problem in problems)
    assert any("method" in problem and "'alpha'" in problem for problem in problems)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"average_bits": 4.0}, ("average_bits 4 is below the smallest possible, 4.2500",)),
        (
            {"budget_bytes": 1000},
            ("budget_bytes 1,000 is below the smallest possible, 403,456", "104,448 for the planned"),
        ),
        (
            {"average_bits": 5.0, "keep": ("*.expert.*",), "pins": {"lm_haed": "int8"}},
            ("keep: '*.expert.*' matches no site", "pins: 'lm_haed' matches no site, did you mean 'lm_head'?"),
        ),
    ],
)
def test_budgets_and_patterns_that_cannot_be_met(
    annotated: Program, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        planned(annotated, **fields)
    assert all(any(part in problem for problem in caught.value.problems) for part in words), caught.value.problems


def test_an_empty_category_is_no_error(annotated: Program) -> None:
    planned(annotated, average_bits=5.0, keep=("attention", "router", "lm_head", "shared_expert_gate"))


def test_alpha_must_be_annotated_first(folder: Path) -> None:
    with pytest.raises(InputError, match="add `- annotate_alpha` before `assign_plan`"):
        run(aqtx.trace(folder), [AssignPlan(method="alpha", average_bits=5.0)])


def test_a_degenerate_matrix_is_kept_apart_with_its_reason(tmp_path: Path) -> None:
    dead = "model.layers.1.mlp.experts.2.up_proj"
    folder = write_checkpoint(tmp_path / "m", **{f"{dead}.weight": torch.zeros(64, 128, dtype=torch.bfloat16)})
    program = run(aqtx.trace(folder), [AnnotateAlpha(), AssignPlan(method="alpha", average_bits=5.0)])
    assert program.plan is not None
    entry = program.plan.sites[dead]
    assert entry.format is None and entry.why == "its alpha is degenerate: all weights are zero"
    row = next(row for row in csv.DictReader(io.StringIO(alpha_csv(program))) if row["layer_name"] == dead)
    assert row["alpha_hill"] == "" and row["method"] == "degenerate: all weights are zero"
    assert len(program.plan.planned) == EXPERTS - 1


def test_nan_weights_are_named(tmp_path: Path) -> None:
    broken = ["model.layers.0.mlp.experts.3.up_proj", "model.layers.1.self_attn.q_proj"]
    values = {f"{name}.weight": torch.full((64 if "up" in name else 128, 128), math.nan).bfloat16() for name in broken}
    folder = write_checkpoint(tmp_path / "m", **values)
    for step in (AnnotateAlpha(), AnnotateError()):
        with pytest.raises(InputError) as caught:
            run(aqtx.trace(folder), [step])
        assert [any(name in problem for problem in caught.value.problems) for name in broken] == [True, True]
