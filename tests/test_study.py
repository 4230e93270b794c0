"""The lab on a small random model: arms at equal bytes, verdicts, correlations, resumption."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import aqtx
from aqtx.errors import InputError
from aqtx.evaluate.perplexity import DocumentScores
from aqtx.passes.annotate_alpha import AnnotateAlpha
from aqtx.passes.assign_plan import AssignPlan
from aqtx.planning.arms import Arm, StudySpec, arm_of
from aqtx.planning.decide import decide
from aqtx.planning.method import arms
from aqtx.program.plan import Plan
from aqtx.registry import Calibration, Context
from aqtx.report.write import write_report
from aqtx.runs.recipe import Recipe, parse_recipe
from aqtx.schema import parse_fields
from aqtx.study.correlate import correlations, held_out, measure_truth
from aqtx.study.run import Study, study_recipe
from aqtx.study.verdict import Point, study_json
from aqtx.text.tokens import Document
from tests.tiny import write_checkpoint

SPEC = StudySpec(methods=("alpha", "fisher", "alphaq", "uniform", "random"), average_bits=(3.75,), random_seeds=2)


def recipe(source: Path) -> Recipe:
    step = {"method": "alpha", "candidates": ["int3", "mxfp4"], "average_bits": 4.0}
    passes = ["annotate_alpha", {"assign_plan": step}]
    return parse_recipe({"version": 1, "model": {"source": str(source)}, "passes": passes})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    program = aqtx.trace(write_checkpoint(folder / "model"))
    g = torch.Generator().manual_seed(2)
    documents = [Document("noise", torch.randint(0, 192, (20,), generator=g)) for _ in range(12)]
    ids = torch.randint(0, 192, (8, 24), generator=g)
    context = Context(quiet=True, load_calibration=lambda: ids)
    AnnotateAlpha().run(program, context)
    made = Study(recipe(folder / "model"), SPEC, folder, program, context, documents)
    made.run()
    return made


def read(study: Study) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((study.directory / "study.json").read_text())
    return data


def test_arms_cost_the_same_bytes(study: Study) -> None:
    points = read(study)["points"]
    assert [row["method"] for row in points] == ["alpha", "fisher", "alphaq", "uniform", "random", "random"]
    bits = [row["average_bits"] for row in points]
    assert max(bits) <= 3.75 and min(bits) > 3.75 - 1.15 / 24  # one matrix of 24 is the grain
    sizes = [row["bytes"] for row in points]
    assert max(sizes) <= min(sizes) * 1.005


def test_bytes_are_those_of_the_whole_model(study: Study) -> None:
    row = read(study)["points"][0]
    specs = study.program.weights.specs.values()
    planned = 24 * 128 * 64
    assert row["bytes"] == sum(spec.numel * 2 for spec in specs) - planned * 2 + round(
        planned * row["average_bits"] / 8
    )


def test_every_arm_has_a_verdict_and_a_correlation(study: Study) -> None:
    data = read(study)
    assert {row["method"] for row in data["verdicts"]} == {"fisher", "alphaq", "uniform", "random"}
    assert all(row["word"] in ("better", "equal", "worse") for row in data["verdicts"])
    assert len(data["summary"]) == 4 and data["summary"][0].startswith("fisher against alpha: ")
    ranked = {row["method"]: row["all"] for row in data["correlations"]}
    assert {"alpha", "fisher", "alphaq", "random"} <= set(ranked) and all(-1 <= (r or 0) <= 1 for r in ranked.values())
    assert ranked["fisher"] is not None and ranked["fisher"] > 0.3  # it measures nearly the same thing


def test_it_is_written_for_people(study: Study) -> None:
    text = (study.directory / "study.md").read_text()
    assert "| alpha | 3.7" in text and "Rank correlation" in text
    write_report(study.directory)
    assert (study.directory / "figures" / "pareto.png").exists()


def test_scores_are_kept(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(study)["points"]
    monkeypatch.setattr("aqtx.study.run.evaluate_perplexity", lambda *_, **__: pytest.fail("scored again"))
    study.run()
    assert read(study)["points"] == before


def test_regret_by_domain_is_measured(study: Study, tmp_path: Path) -> None:
    """Divergences of all documents of a domain, under the plan over those under the domain's own plan."""
    g = torch.Generator().manual_seed(4)
    parts = {name: (torch.randint(low, low + 90, (6, 24), generator=g), 1.0) for name, low in (("a", 0), ("b", 100))}
    documents = [Document(name, torch.randint(0, 192, (20,), generator=g)) for name in "abc" * 3]
    context = Context(quiet=True, load_calibration=lambda: Calibration.mix(parts))
    program = aqtx.trace(study.program.folder or "")
    AnnotateAlpha().run(program, context)
    spec = replace(SPEC, methods=("fisher",), reference="fisher", domains=True, trial_seconds=0.0)
    made = Study(study.recipe, spec, tmp_path, program, context, documents)
    rows = made.run()["domains"]
    assert [(row["objective"], row["domain"]) for row in rows] == [
        (objective, domain) for domain in "ab" for objective in ("mean", "worst_domain")
    ]
    for row in rows:
        assert row["regret"]["value"] == pytest.approx(row["divergence"]["value"] / row["own"]["value"])
        assert row["divergence"]["value"] > 0 and row["predicted"] >= 1 - 1e-9
    assert "| 3.75 | worst_domain | b |" in (tmp_path / "study.md").read_text()
    write_report(tmp_path)
    assert "predicted regret" in (tmp_path / "report.html").read_text()


def scores(nll: list[float]) -> DocumentScores:
    return DocumentScores(("d",) * len(nll), np.array(nll), np.full(len(nll), 10), 16, 0)


def test_verdicts_follow_the_paired_interval() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(30, 10, 40)  # documents differ far more than methods
    arms = {"alpha": base, "better": base - 1 + rng.normal(0, 0.3, 40), "equal": base + rng.normal(0, 0.3, 40)}
    arms["worse"] = base + 1 + rng.normal(0, 0.3, 40)
    plan = Plan(sites={}, method="alpha")
    points = [Point(name, 4.0, 0, 100, plan, scores(nll.tolist())) for name, nll in arms.items()]
    data = study_json(scores(base.tolist()), points, 0)
    assert {row["method"]: row["word"] for row in data["verdicts"]} == {n: n for n in ("better", "equal", "worse")}


def test_random_seeds_are_averaged_and_counted() -> None:
    base = np.linspace(20, 40, 30)
    plan = Plan(sites={}, method="alpha")
    points = [Point("alpha", 4.0, 0, 1, plan, scores(base.tolist()))]
    points += [
        Point("random", 4.0, seed, 1, plan, scores((base + shift).tolist())) for seed, shift in enumerate((1, -3))
    ]
    [row] = study_json(scores(base.tolist()), points, 0)["verdicts"]
    assert row["difference"]["value"] == pytest.approx(-0.1) and (row["seeds"], row["seeds_worse"]) == (2, 1)


def test_the_reference_is_the_recipes_own_method() -> None:
    step = AssignPlan(method="alpha", direction="high_alpha_high_bits", average_bits=4.0)
    assert arm_of(step) == "alpha_reversed"
    arms = StudySpec(methods=("error",), average_bits=(3.0, 4.0)).arms(step)
    assert [(arm.name, arm.bits) for arm in arms] == [(n, b) for b in (3.0, 4.0) for n in ("alpha_reversed", "error")]
    assert arms[0].settings.direction == "high_alpha_high_bits" and arms[0].settings.average_bits == 3.0


def test_mistakes_in_the_section_are_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        StudySpec(methods=("fischer", "alfa"), average_bits=())
    assert [problem.split(",")[0] for problem in caught.value.problems[:2]] == [
        "methods: unknown 'fischer'",
        "methods: unknown 'alfa'",
    ]
    made, problems = parse_fields(StudySpec, {"method": ["alpha"]}, "study")
    assert made is None and "did you mean 'methods'" in problems[0]
    assert set(arms()) >= {"alpha", "alpha_reversed", "random", "uniform", "calibrated"}


def test_a_study_is_held_against_its_model_as_a_run_is(tmp_path: Path) -> None:
    source, output = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    passes: list[Any] = ["annotate_alpha", {"assign_plan": {"average_bits": 4.5, "keep": ["*.nowhere"]}}]
    asked = {"version": 1, "model": {"source": str(source)}, "output": str(output), "passes": passes}
    with pytest.raises(InputError, match=r"passes.1.assign_plan: keep: '\*.nowhere' matches no site"):
        study_recipe(parse_recipe(asked), SPEC, quiet=True)
    passes[1]["assign_plan"]["keep"] = ["router"]
    with pytest.raises(InputError, match=r"study: average_bits 9 is above the largest possible, 8.2500"):
        study_recipe(parse_recipe(asked), StudySpec(methods=("error",), average_bits=(4.5, 9.0)), quiet=True)
    assert not output.with_name("out.study").exists()


def test_the_truth_is_measured_on_text_that_no_method_saw(study: Study) -> None:
    """Trials of the method `trial` stay its own: where it was compared with itself, the correlation was 1."""
    ids = torch.randint(0, 192, (6, 24), generator=torch.Generator().manual_seed(5))
    seen, held = (part.ids for part in held_out(Calibration(ids), 4))
    assert len(seen) == len(held) == 3 and torch.equal(torch.cat([seen, held]), ids)
    settings = AssignPlan(method="trial", candidates=("int3", "mxfp4"), average_bits=4.0, trial_sequences=2)
    context = Context(quiet=True, load_calibration=lambda: seen)
    decide(study.program, settings, context)
    sites = {site.name: site.get("trial_loss") for site in study.program.sites()}
    truth = measure_truth(study.program, settings, context, 60.0, held)
    assert {site.name: site.get("trial_loss") for site in study.program.sites()} == sites
    [row] = [
        row for row in correlations(study.program, truth, [Arm("trial", 4.0, 0, settings)]) if row["method"] == "trial"
    ]
    own = [sites[site.name]["int3"] for site in truth.sites]
    assert own != truth.loss and row["all"] == pytest.approx(float(spearmanr(own, truth.loss)[0]), abs=1e-4)
    assert row["all"] < 1
    with pytest.raises(InputError, match="text that no method saw"):
        held_out(Calibration(ids[:1]), 4)
