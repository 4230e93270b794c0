"""Calibration text of several domains: how it is mixed, what is kept by domain, and plans for the worst one."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import aqtx
from aqtx.commands.plan import conclusion
from aqtx.errors import InputError
from aqtx.formats import fake_quantize, parse
from aqtx.numerics.allocate import allocate
from aqtx.numerics.minimax import least_regret
from aqtx.passes.assign_plan import AssignPlan
from aqtx.program.plan import Plan
from aqtx.program.program import Program
from aqtx.registry import Calibration, Context
from aqtx.report.data import RunData
from aqtx.report.sections import plan as plan_section
from aqtx.runs.opening import calibration_of, program_of
from aqtx.runs.pipeline import run
from aqtx.runs.preflight import preflight
from aqtx.runs.recipe import parse_recipe
from aqtx.sensitivity.fisher import Detail, measure_fisher
from aqtx.sensitivity.measured import requests
from aqtx.sensitivity.selection import unique_sites
from aqtx.text.calibration_spec import CalibrationSpec
from aqtx.text.sources import BUILTIN_DOMAINS, read_passages
from tests.tiny import write_checkpoint

FORMATS = [parse(name) for name in ("int3", "mxfp4")]


def two_domains(weight: float = 3.0) -> Calibration:
    g = torch.Generator().manual_seed(1)
    low, high = torch.randint(0, 90, (4, 24), generator=g), torch.randint(90, 192, (2, 24), generator=g)
    return Calibration.mix({"low": (low, 1.0), "high": (high, weight)})


def context_of(text: Calibration, **fields: Any) -> Context:
    return Context(seed=3, quiet=True, load_calibration=lambda: text, **fields)


def test_any_first_sequences_are_mixed_like_the_whole() -> None:
    parts = {"a": (torch.zeros(8, 2, dtype=torch.long), 1.0), "b": (torch.ones(4, 2, dtype=torch.long), 2.0)}
    text = Calibration.mix(parts)
    assert "".join(text.domains) == "aba" * 4
    assert torch.equal(text.ids[:, 0], torch.tensor([0, 1, 0] * 4))
    assert text.weights == {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 3)}
    assert text.shares().tolist() == pytest.approx([1 / 24 if name == "a" else 1 / 6 for name in text.domains])
    assert text[:1].weights == {"a": 1.0}
    alone = Calibration(text.ids)
    assert alone.weights == {} and alone.shares().tolist() == pytest.approx([1 / 12] * 12)


def test_sequences_are_shared_out_by_weight() -> None:
    spec = CalibrationSpec(source={"builtin:wiki": 1, "self": 2, "c4": 0.5}, num_sequences=9, temperature=0.9)
    parts = spec.parts()
    assert {name: part.num_sequences for name, part in parts.items()} == {"builtin:wiki": 3, "self": 5, "c4": 1}
    assert [part.temperature for part in parts.values()] == [1.0, 0.9, 1.0]
    with pytest.raises(InputError, match="the weights give none to source 'c4'"):
        CalibrationSpec(source={"builtin": 1, "c4": 0.01}, num_sequences=4).parts()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({}, "names no text"),
        ({"builtin": 0, "c4": -1}, "weight of 'builtin' is 0"),
        ({"builtin": "much"}, "calibration.source"),
        ({"builtin": 1, "c4": 1}, None),
    ],
)
def test_weights_that_are_none_are_told(source: dict[str, Any], told: str | None) -> None:
    asked = {"version": 1, "model": {"source": "tinymoe"}, "calibration": {"source": source}}
    if told is None:
        assert parse_recipe(asked).calibration.weights == source
        return
    with pytest.raises(InputError, match=told):
        parse_recipe(asked)


def test_a_recipe_mixes_the_shipped_domains_and_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a line of my own\n" * 400)
    (tmp_path / "code.jsonl").write_text('{"domain": "code", "text": "%s"}\n' % ("x = y + 1 ; " * 400))
    source = {"builtin:python": 2, str(tmp_path / "notes.txt"): 1, str(tmp_path / "code.jsonl"): 1}
    asked = {"source": source, "num_sequences": 8, "sequence_length": 32}
    recipe = parse_recipe({"version": 1, "model": {"source": "tinymoe"}, "calibration": asked})
    program = program_of(recipe)
    text = calibration_of(recipe, program, Context(quiet=True))
    names = {"python": 4, str(tmp_path / "notes.txt"): 2, "code": 2}
    assert {name: text.domains.count(name) for name in names} == names and text.ids.shape == (8, 32)
    assert text.weights == {"python": 0.5, str(tmp_path / "notes.txt"): 0.25, "code": 0.25}
    wrong = parse_recipe(
        {"version": 1, "model": {"source": "tinymoe"}, "calibration": {"source": {"builtin:wiki": 1, "wiki": 1}}}
    )
    assert any("'wiki' is neither" in problem and "builtin:wiki" in problem for problem in preflight(wrong, program))


def test_a_source_alone_knows_its_domains() -> None:
    assert set(BUILTIN_DOMAINS) == {passage.domain for passage in read_passages("builtin", "calibration")}
    asked = {"num_sequences": 10, "sequence_length": 16}
    recipe = parse_recipe({"version": 1, "model": {"source": "tinymoe"}, "calibration": asked})
    text = calibration_of(recipe, program_of(recipe), Context(quiet=True))
    assert text.domains == tuple(dict.fromkeys(text.domains)) * 2 and set(text.domains) == set(BUILTIN_DOMAINS)
    assert text.weights == {name: pytest.approx(0.2) for name in BUILTIN_DOMAINS}
    with pytest.raises(InputError, match="builtin:prose"):
        read_passages("builtin:prose", "evaluation")


def by_sequence(program: Program, context: Context, detail: Detail) -> dict[str, Tensor]:
    """The oracle: all weights resident; what each sequence alone says of each site and format [formats, sequences]."""
    ids, generator = context.calibration(), torch.Generator().manual_seed(context.seed)
    module, found = program.module(), dict[str, list[Tensor]]()
    parameters = {name: module.get_parameter(name).requires_grad_(True) for name in program.sites_by_weight()}
    for sequence in ids:
        logits = module(sequence[None])[0].float()
        if detail == "direction":
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        else:
            logits, labels = logits[:-1], sequence[1:]
        gradients = torch.autograd.grad(
            cross_entropy(logits, labels, reduction="sum"), list(parameters.values()), allow_unused=True
        )
        for name, site in unique_sites(program).items():
            gradient = gradients[list(parameters).index(site.weight)]
            g = gradient if site.expert is None else gradient[site.expert]
            errors = torch.stack([fake_quantize(program.read(site), fmt) - program.read(site) for fmt in FORMATS])
            along = (errors * g).sum((1, 2)).square() if detail == "direction" else (errors * g).square().sum((1, 2))
            found.setdefault(name, []).append(0.5 * along.double() / len(labels))
    return {name: torch.stack(values, 1) for name, values in found.items()}


@pytest.mark.parametrize("detail", ["direction", "element"])
def test_fisher_is_kept_by_domain_and_its_mean_is_weighted(tmp_path: Path, detail: Detail) -> None:
    """float32 sums of some 1e4 terms of both signs, as in test_fisher_blocks."""
    program, context = aqtx.trace(write_checkpoint(tmp_path / "m"), dtype=torch.float32), context_of(two_domains())
    measure_fisher(program, requests(unique_sites(program).values(), FORMATS), context, detail=detail)
    key = {"direction": "fisher", "element": "fisher_element"}[detail]
    expected, text = by_sequence(program, context, detail), context.by_domain()
    scale = max(float(values.max()) for values in expected.values())
    for name, site in unique_sites(program).items():
        means = {domain: expected[name][:, text.rows(domain)].mean(1) for domain in ("low", "high")}
        for domain, mean in means.items():
            found = [site.get(f"{key}_domains")[domain][fmt.name] for fmt in FORMATS]
            assert found == pytest.approx(mean.tolist(), rel=1e-3, abs=1e-9 * scale), (name, domain)
        whole = 0.25 * means["low"] + 0.75 * means["high"]
        assert [site.get(key)[fmt.name] for fmt in FORMATS] == pytest.approx(whole.tolist(), rel=1e-3, abs=1e-9 * scale)


def test_one_domain_is_annotated_once(tmp_path: Path) -> None:
    program = aqtx.trace(write_checkpoint(tmp_path / "m"), dtype=torch.float32)
    measure_fisher(program, requests(program.sites()[:1], FORMATS), context_of(Calibration(two_domains().ids)))
    assert program.sites()[0].get("fisher") and program.sites()[0].get("fisher_domains") is None


def test_the_bound_holds_and_the_plan_is_near_it() -> None:
    """All 3^7 plans are tried; the allocator is told to be exact."""
    g = torch.Generator().manual_seed(0)
    size, budget = torch.tensor([[2.0, 3.0, 4.0]]).repeat(7, 1), 21.0
    for _ in range(5):
        cost = torch.rand(3, 7, 3, generator=g, dtype=torch.float64) * torch.tensor([9.0, 3.0, 1.0])
        plans = torch.tensor([p for p in itertools.product(range(3), repeat=7) if sum(p) + 14 <= budget])
        losses = cost[:, torch.arange(7), plans].sum(2)  # [D, plans]
        least = losses.min(1).values
        found = least_regret(cost, least, lambda each: allocate(each, size, budget, exact=True))
        optimum = float((losses / least[:, None]).max(0).values.min())
        assert found.bound <= optimum * (1 + 1e-9) and optimum <= float(found.regret.max()) * (1 + 1e-9)
        assert float(size[0, found.choice].sum()) <= budget
        assert float(found.regret.max()) == pytest.approx(found.bound * (1 + found.gap))


def test_many_matrices_leave_a_small_gap_and_no_worse_plan_than_the_mean() -> None:
    g = torch.Generator().manual_seed(1)
    cost = torch.rand(4, 300, 1, generator=g, dtype=torch.float64).exp() ** 3 * torch.tensor([9.0, 3.0, 1.0])
    size = torch.tensor([[2.0, 3.0, 4.0]]).repeat(300, 1)
    least = torch.tensor([allocate(each, size, 900.0).cost for each in cost], dtype=torch.float64)
    found = least_regret(cost, least, lambda each: allocate(each, size, 900.0))
    mean = allocate(cost.mean(0), size, 900.0).choice
    worst = (cost.gather(2, mean.expand(4, -1)[..., None]).sum((1, 2)) / least).max()
    assert found.gap < 0.02 and float(found.regret.max()) < float(worst)


def planned(folder: Path, text: Calibration | Tensor, **settings: Any) -> Plan:
    program = aqtx.trace(folder)
    step = AssignPlan(candidates=("int2", "int3", "mxfp4"), average_bits=3.2, **settings)
    plan = run(program, [step], calibration=text).plan
    assert plan is not None
    return plan


def test_the_plan_tells_what_it_costs_each_domain(tmp_path: Path) -> None:
    folder, text = write_checkpoint(tmp_path / "m"), two_domains()
    mean, worst = planned(folder, text), planned(folder, text, objective="worst_domain")
    for plan in (mean, worst):
        assert set(plan.domains) == {"low", "high"}
        for row in plan.domains.values():
            assert row["regret"] == pytest.approx(row["loss"] / row["own"]) and row["regret"] >= 1 - 1e-9
    assert mean.cost == pytest.approx(0.25 * mean.domains["low"]["loss"] + 0.75 * mean.domains["high"]["loss"])
    largest = [max(row["regret"] for row in plan.domains.values()) for plan in (mean, worst)]
    assert largest[1] <= largest[0] and worst.worst_domain["bound"] <= largest[1]
    assert Plan.from_json(worst.to_json()) == worst and "domains" in worst.to_json()
    assert "of its own best plan" in conclusion(worst) and "largest regret" in conclusion(worst)
    page = plan_section(RunData(tmp_path, plan=worst.to_json()))
    assert "<td>low</td>" in page or "low" in page.partition("Predicted loss by domain")[2]


def test_there_is_no_worst_of_one_domain(tmp_path: Path) -> None:
    folder, text = write_checkpoint(tmp_path / "m"), two_domains().ids
    assert planned(folder, text).domains == {} and "domains" not in planned(folder, text).to_json()
    with pytest.raises(InputError, match="worst_domain needs calibration text of two domains"):
        planned(folder, text, objective="worst_domain")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "error"}, "goes with methods that know costs by domain: fisher"),
        ({"rotate": "auto"}, "does not go with rotate auto"),
    ],
)
def test_an_objective_that_nothing_honours_is_refused(settings: dict[str, Any], told: str) -> None:
    problems = AssignPlan(average_bits=4.5, objective="worst_domain", **settings).problems()
    assert any(told in problem for problem in problems)


def test_python_is_told_about_domains_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="2 sequences, but 1 names"):
        Calibration(torch.zeros(2, 3, dtype=torch.long), ("a",))
    with pytest.raises(InputError, match="domain 'b' has no weight"):
        Calibration(torch.zeros(2, 3, dtype=torch.long), ("a", "b"), {"a": 1.0})
