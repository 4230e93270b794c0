"""Fisher information measured again at a plan's weights, and the loss that a plan foretells beside the measured one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import aqtx
from aqtx.formats import fake_quantize, parse
from aqtx.passes.assign_plan import AssignPlan
from aqtx.program.plan import Plan
from aqtx.registry import Context
from aqtx.report.data import RunData
from aqtx.report.sections import plan as plan_section
from aqtx.runs.pipeline import run
from aqtx.sensitivity.fisher import losses_along
from aqtx.sensitivity.measured import requests
from aqtx.sensitivity.selection import unique_sites
from tests.tiny import write_checkpoint

FORMATS = [parse(name) for name in ("int3", "mxfp4")]


def test_gradients_are_those_of_the_rounded_model(tmp_path: Path) -> None:
    """Against autograd on a resident module with the plan's values; errors are from the original weights.

    float32 sums of some 1e4 terms of both signs, as in test_fisher_blocks.
    """
    program = aqtx.trace(write_checkpoint(tmp_path / "m"), dtype=torch.float32)
    sites = unique_sites(program)
    plan = [(site, parse("int2")) for name, site in sites.items() if ".experts." in name and site.layer == 0]
    ids = torch.randint(0, 192, (3, 24), generator=torch.Generator().manual_seed(1))
    found = losses_along(program, requests(sites.values(), FORMATS), ids, Context(seed=3, quiet=True), plan)

    module, generator = program.module(), torch.Generator().manual_seed(3)
    errors = {
        name: torch.stack([fake_quantize(program.read(site), fmt) - program.read(site) for fmt in FORMATS])
        for name, site in sites.items()
    }
    parameters = {}
    for weight in program.sites_by_weight():
        value = module.get_parameter(weight).detach().clone()
        for site, fmt in plan:
            if site.weight == weight:
                value[site.expert] = fake_quantize(program.read(site), fmt)
        module.get_parameter(weight).data = value
        parameters[weight] = module.get_parameter(weight).requires_grad_(True)
    for row, sequence in enumerate(ids):
        logits = module(sequence[None])[0].float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        gradients = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), list(parameters.values()))
        for name, site in sites.items():
            g = gradients[list(parameters).index(site.weight)]
            along = (errors[name] * (g if site.expert is None else g[site.expert])).sum((1, 2), dtype=torch.float64)
            expected = 0.5 * along.square() / ids.shape[1]
            scale = float(0.5 * errors[name].double().square().sum()) * 1e-6
            assert found[name][:, row].tolist() == pytest.approx(expected.tolist(), rel=1e-3, abs=scale), name


def planned(folder: Path, **settings: Any) -> tuple[Plan, dict[str, Any]]:
    ids = torch.randint(0, 192, (6, 24), generator=torch.Generator().manual_seed(1))
    program = aqtx.trace(folder)
    step = AssignPlan(candidates=("int2", "int3", "mxfp4"), average_bits=3.2, **settings)
    context = Context(quiet=True, load_calibration=lambda: ids)
    changes = step.run(program, context)
    assert program.plan is not None
    return program.plan, changes.details


def test_the_second_plan_follows_the_second_measurement(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (one, first), (two, details) = planned(folder), planned(folder, rounds=2)
    assert "rounds" not in first and details["rounds"][0]["changed"] == 0
    assert details["rounds"][0]["cost"] == pytest.approx(one.cost) and details["rounds"][1]["cost"] == two.cost
    differing = sum(one.sites[name].format != entry.format for name, entry in two.sites.items())
    assert differing == details["rounds"][1]["changed"]
    assert two.average_bits is not None and two.average_bits <= 3.2
    assert two.cost == pytest.approx(sum(entry.cost or 0.0 for entry in two.planned.values()))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "error", "rounds": 2}, "only method fisher"),
        ({"fisher_detail": "element", "rounds": 2}, "only method fisher"),
        ({"objective": "worst_domain", "rounds": 2}, "goes with objective mean"),
        ({"rounds": 0}, "rounds is below 1"),
    ],
)
def test_rounds_that_nothing_honours_are_refused(settings: dict[str, Any], told: str) -> None:
    problems = AssignPlan(average_bits=4.5, **settings).problems()
    assert [problem for problem in problems if told in problem]


def test_the_report_sets_the_foretold_loss_beside_the_measured_one(tmp_path: Path) -> None:
    plan, _ = planned(write_checkpoint(tmp_path / "m"))
    assert plan.foretold == plan.cost and Plan.from_json(plan.to_json()) == plan
    report = {"perplexity": {"change": {"value": 0.0123, "low": 0.01, "high": 0.015}}}
    page = plan_section(RunData(tmp_path, report=report, plan=plan.to_json()))
    assert f"Foretold loss: {plan.foretold:.4f}" in page and "+0.0123 [+0.0100, +0.0150]" in page
    assert "not measured" in plan_section(RunData(tmp_path, plan=plan.to_json()))
    other = run(aqtx.trace(tmp_path / "m"), [AssignPlan(method="error", average_bits=5.0)]).plan
    assert other is not None and other.foretold is None
    assert "Foretold" not in plan_section(RunData(tmp_path, plan=other.to_json()))
