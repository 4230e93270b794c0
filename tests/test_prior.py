"""Plans from a relative's plan: its profile by role and depth, and what is told where it does not fit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import aqtx
from aqtx.passes.assign_plan import AssignPlan
from aqtx.planning.profile import read_profile
from aqtx.program.plan import Plan, PlanEntry
from aqtx.runs.pipeline import misfits, run
from tests.tiny import OLMOE, write_checkpoint

ROLES = ("gate_proj", "up_proj", "down_proj")


def planted(num_layers: int, method: str = "fisher", roles: tuple[str, ...] = ROLES) -> Plan:
    """A relative in which role r at relative depth t costs exp(r + 2 t) per unit of error, whatever the expert."""
    sites = {}
    for layer in range(num_layers):
        for expert in range(2):
            for r, role in enumerate(roles):
                error = 0.01 * (1 + expert)
                cost = error * math.exp(r + 2 * layer / max(num_layers - 1, 1))
                name = f"model.layers.{layer}.mlp.experts.{expert}.{role}"
                sites[name] = PlanEntry(format="int3", category=f"mlp_{role[:-5]}", error=error, cost=cost, numel=8)
    return Plan(sites=sites, method=method)


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_the_profile_is_that_of_the_relative(tmp_path: Path, num_layers: int) -> None:
    """Between layers it is linear in the logarithm, as what was planted is; a model of two layers asks at both ends."""
    program = aqtx.trace(write_checkpoint(tmp_path / "model"))
    sites = [site for site in program.sites() if site.expert is not None]
    profile = read_profile(planted(num_layers).to_json())
    assert profile.problems(sites) == []
    rise = 2.0 if num_layers > 1 else 0.0
    expected = [ROLES.index(site.name.rpartition(".")[2]) + rise * (site.layer or 0) for site in sites]
    assert profile.at(sites) == pytest.approx(expected)


def test_depth_is_interpolated(tmp_path: Path) -> None:
    deep = write_checkpoint(tmp_path / "deep", {**OLMOE, "num_hidden_layers": 5})
    sites = [site for site in aqtx.trace(deep).sites() if site.name.endswith("experts.0.gate_proj")]
    assert read_profile(planted(2).to_json()).at(sites) == pytest.approx([0, 0.5, 1, 1.5, 2])


def planned(folder: Path, **settings: Any) -> Plan:
    step = AssignPlan(method="prior", candidates=("int2", "int3", "mxfp4"), average_bits=3.2, **settings)
    found = run(aqtx.trace(folder), [step]).plan
    assert found is not None
    return found


def test_a_plan_follows_it_and_needs_no_text(tmp_path: Path) -> None:
    """The planted profile makes late layers and down the dearest: nothing of them is smaller than what is cheapest."""
    folder = write_checkpoint(tmp_path / "model")
    (tmp_path / "relative").mkdir()
    (tmp_path / "relative" / "plan.json").write_text(json.dumps(planted(3).to_json()))
    plan = planned(folder, prior=str(tmp_path / "relative"))
    assert plan.average_bits is not None and plan.average_bits <= 3.2
    bits = {name: 8 * entry.bytes / entry.numel for name, entry in plan.planned.items()}
    dear = [value for name, value in bits.items() if ".layers.1." in name and name.endswith("down_proj")]
    cheap = [value for name, value in bits.items() if ".layers.0." in name and name.endswith("gate_proj")]
    assert min(dear) > max(cheap)
    assert planned(folder, prior=str(tmp_path / "relative" / "plan.json")) == plan


def test_a_models_own_plan_keeps_what_role_and_depth_carry(tmp_path: Path) -> None:
    """Each site is charged its error times the mean, over its role and layer, of what its own plan said."""
    program = aqtx.trace(write_checkpoint(tmp_path / "model"))
    ids = torch.randint(0, 192, (6, 24), generator=torch.Generator().manual_seed(1))
    own = run(program, [AssignPlan(candidates=("int2", "int3"), average_bits=2.8)], calibration=ids).plan
    assert own is not None
    step = AssignPlan(method="prior", prior=own.to_json(), candidates=("int2", "int3"), average_bits=2.8)
    sites = [site for site in program.sites() if site.name in own.planned]
    assert step.row.cost is not None
    found = step.row.cost(sites, step.formats, step.own, 0)
    ratios: dict[tuple[str, int | None], list[float]] = {}
    for site in sites:
        entry = own.sites[site.name]
        assert entry.cost is not None and entry.error is not None
        ratios.setdefault((site.category, site.layer), []).append(math.log(entry.cost / entry.error))
    for row, site in enumerate(sites):
        mean = ratios[site.category, site.layer]
        error = site.get("error")
        expected = [math.exp(sum(mean) / len(mean)) * error[name] for name in ("int2", "int3")]
        assert found[row].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prior", "told"),
    [
        (planted(2, "fisher", ("gate_proj",)).to_json(), "nothing of the role mlp_down, mlp_up, only of mlp_gate"),
        ({"default": {"wq": "int4"}}, "no plan.json of a model"),
        (Plan(sites={"a": PlanEntry(format="int3")}, method="uniform").to_json(), "uniform, foretold no losses"),
        ("nowhere.json", "nowhere.json"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_read(tmp_path: Path, prior: Any, told: str) -> None:
    program = aqtx.trace(write_checkpoint(tmp_path / "model"))
    step = AssignPlan(method="prior", prior=prior, candidates=("int3", "mxfp4"), average_bits=4.0)
    assert any(told in problem for problem in misfits(program, [step]))


def test_the_key_goes_with_the_method() -> None:
    for settings in ({"method": "prior"}, {"method": "error", "prior": "plan.json"}):
        problems = AssignPlan(average_bits=4.5, **settings).problems()  # type: ignore[arg-type]
        assert [problem for problem in problems if "goes with method prior and only with it" in problem]
