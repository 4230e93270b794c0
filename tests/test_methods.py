"""Methods of planning as rows of a table: one more is one record; a row says what the method reads and needs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import aqtx
from aqtx import cli
from aqtx.errors import InputError
from aqtx.passes.annotate_alpha import AnnotateAlpha
from aqtx.passes.assign_plan import AssignPlan
from aqtx.planning.arms import StudySpec
from aqtx.planning.method import METHODS, Method, arms, register
from aqtx.planning.settings import Settings
from aqtx.program import annotations
from aqtx.program.annotations import ANNOTATIONS, declare
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.runs.pipeline import run
from aqtx.schema import parse_fields
from aqtx.sensitivity.measured import values
from tests.tiny import OLMOE, write_checkpoint

BITS = {"mxfp4": 4.25, "mxfp6_e2m3": 6.25, "mxfp8_e4m3": 8.25}
QUICKSTART = "passes.1.assign_plan"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return run(aqtx.trace(write_checkpoint(tmp_path_factory.mktemp("methods") / "model")), [AnnotateAlpha()])


@pytest.fixture
def name_length(monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    """A method that nobody needs: sites with long names are sensitive. All of it is this record."""
    monkeypatch.setattr(annotations, "ANNOTATIONS", dict(ANNOTATIONS))
    declare("name_length", float, "letters of the name")

    def measure(program: Program, wanted: Any, own: Mapping[str, Any], context: Context, seed: int) -> dict[str, Any]:
        for site, _ in wanted:
            site.set("name_length", float(len(site.name)) ** own["gamma"])
        return {"told": sorted(own)}

    def cost(sites: Any, formats: Any, own: Mapping[str, Any], seed: int) -> torch.Tensor:
        bits = torch.tensor([fmt.element.bits for fmt in formats], dtype=torch.float64)
        return values(sites, "name_length")[:, None] * torch.exp2(-bits)

    row = Method(
        name="name_length",
        summary="letters of the name",
        options=("gamma",),
        measure=measure,
        cost=cost,
        arms={"name_length": {"gamma": 1.0}},
    )
    yield register(row)
    del METHODS["name_length"]


def test_a_method_is_one_record(program: Program, name_length: Method, capsys: pytest.CaptureFixture[str]) -> None:
    step, problems = parse_fields(AssignPlan, {"method": "name_length", "gamma": 3.0, "average_bits": 5}, "p")
    assert step is not None and problems == step.validate() == step.unread() == []
    changes = step.run(program, Context(quiet=True))
    assert changes.details["told"] == sorted(name_length.keys) and "gamma" in name_length.keys
    plan = program.plan
    assert plan is not None and plan.method == "name_length" and plan.average_bits == 5.0 and plan.gap == 0
    lengths: dict[str | None, set[int]] = {}
    for name, entry in plan.planned.items():
        lengths.setdefault(entry.format, set()).add(len(name))
    assert min(lengths["mxfp6_e2m3"]) >= max(lengths["mxfp4"])  # sizes are equal, so the longest names get the bits
    assert StudySpec(methods=("name_length",), average_bits=(5.0,)).arms(step)[-1].settings.method == "name_length"
    assert cli.main(["ls", "methods"]) == 0 and "name_length\n  letters of the name." in capsys.readouterr().out
    _, problems = parse_fields(AssignPlan, {"method": "name_lenght", "average_bits": 5}, "p")
    assert "did you mean 'name_length'" in problems[0] and "one of alpha, " in problems[0]
    search, problems = parse_fields(AssignPlan, {"method": "search", "base": "name_length"}, "p")
    assert problems == [] and search is not None and search.costed.row is name_length


def test_a_name_is_taken_once(name_length: Method) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register(name_length)
    with pytest.raises(ValueError, match="a cost and a rule"):
        register(Method(name="both", summary="", cost=name_length.cost, choose=METHODS["even"].choose))
    assert "both" not in METHODS


def test_rows_say_what_there_is() -> None:
    fields = set(Settings.__dataclass_fields__)
    assert len(METHODS) == 17 and all(row.name == name and row.summary for name, row in METHODS.items())
    assert {name: row.keys - fields for name, row in METHODS.items() if row.keys - fields} == {}
    assert {name for row in METHODS.values() for name in row.needs} <= set(ANNOTATIONS)
    unread = fields - {key for row in METHODS.values() for key in row.keys}
    assert unread == set()  # a key that no method reads has no use
    assert len(arms()) == 17 and all(Settings(**keys, average_bits=4.0).problems() == [] for keys in arms().values())


def test_a_method_is_given_only_what_its_row_names() -> None:
    own = Settings(method="fisher", average_bits=5.0, gamma=2.0).own
    assert "gamma" not in own and own["fisher_sequences"] == 64


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"method": "fisher", "gamma": 0.5}, ["gamma: method fisher does not read it; alpha, alphaq would"]),
        ({"method": "alpha", "half": "back"}, ["half: method alpha does not read it; front_back would"]),
        ({"method": "search", "gamma": 0.5}, []),  # its base, alpha, does
        ({"method": "search", "base": "error", "gamma": 0.5}, ["gamma: method search does not"]),
        ({"method": "alpha", "rotation_block": 16}, ["rotation_block: nothing reads it where rotate is none"]),
        ({"method": "alpha", "rotation_block": 16, "rotate": "auto"}, []),
        ({"method": "manual", "plan": "x", "candidates": ("int4",)}, ["candidates: method manual does not"]),
        ({"method": "uniform", "prove": False, "seed": 3}, ["prove: ", "seed: "]),
    ],
)
def test_keys_that_are_not_read_are_told(fields: dict[str, Any], told: list[str]) -> None:
    found = AssignPlan(**fields).unread()
    assert [start for start, sentence in zip(told, found, strict=True) if not sentence.startswith(start)] == []


def test_check_tells_an_unread_key_and_a_study_reads_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "quickstart", f"{QUICKSTART}.gamma=0.5"]) == 2
    assert f"{QUICKSTART}.gamma: method fisher does not read it" in capsys.readouterr().err
    assert cli.main(["check", "study", f"{QUICKSTART}.num_trials=9"]) == 0
    assert cli.main(["check", "study", f"{QUICKSTART}.num_trials=9", "study.methods=[alpha]"]) == 2


LIMITED = [
    {"pins": {"*.experts.0.*": "mxfp8"}},
    {"pins": {"*.experts.0.*": "int2"}},
    {"min_bits": {"mlp_down": 6}},
    {"max_bits": {"*.layers.0.*.up_proj": 4}, "min_bits": {"*.layers.1.*": 8}},
]


@pytest.mark.parametrize("limits", LIMITED)
@pytest.mark.parametrize("method", ["uniform", "even", "front_back"])
@pytest.mark.parametrize("bits", [5.9, 6.3, 7.0])
def test_a_budget_holds_with_pins_and_limits(
    program: Program, method: str, limits: dict[str, Any], bits: float
) -> None:
    if "max_bits" in limits and bits < 6.25:  # half of the sites at 4.25 or more, half at 8.25
        with pytest.raises(InputError, match=r"below the smallest possible, 6\.2500"):
            made(program, method=method, average_bits=bits, **limits)
        return
    plan = made(program, method=method, average_bits=bits, **limits)
    used = sum(BITS.get(entry["format"], 2.125) for entry in plan.values()) / len(plan)  # all sites are of one size
    assert used <= bits
    for name, entry in plan.items():
        if "experts.0." in name and "pins" in limits:
            assert entry["format"] in ("mxfp8_e4m3", "int2")
        if "mlp_down" in limits.get("min_bits", {}) and "down_proj" in name:
            assert entry["format"] != "mxfp4"
    free = [name for name, entry in plan.items() if entry["format"] in ("mxfp4", "mxfp6_e2m3")]
    if method == "even" and "max_bits" not in limits and free:  # what is left would not raise one more matrix
        assert bits - used < (8.25 - 4.25) / len(plan)


def made(program: Program, **fields: Any) -> dict[str, dict[str, Any]]:
    step = AssignPlan(**{"candidates": ("mxfp4", "mxfp6", "mxfp8"), **fields})
    assert step.validate() == []
    step.run(program, Context(quiet=True))
    assert program.plan is not None
    sites = json.loads(json.dumps(program.plan.to_json()))["sites"]
    return {name: entry for name, entry in sites.items() if entry["format"] is not None}


def test_uniform_gives_a_group_one_format_where_a_limit_meets_it(program: Program) -> None:
    plan = made(program, method="uniform", average_bits=6.3, groups=("experts",), min_bits={"*.0.mlp.experts.2.*": 6})
    assert {e["format"] for name, e in plan.items() if ".layers.0." in name} == {"mxfp6_e2m3"}
    with pytest.raises(InputError, match=r"leave .*experts.0.* no common format \(1 such groups\)"):
        made(program, method="uniform", average_bits=8.0, groups=("experts",), pins={"*.0.mlp.experts.2.*": "int8"})


LATE = [
    (["passes=[annotate_alpha, {assign_plan: {average_bits: 5.0}}, emit]"], "add `- gptq` or `- quantize` after it"),
    (["passes=[annotate_alpha, {assign_plan: {average_bits: 5.0}}, gptq]"], "add `- emit` as the last pass"),
    (["passes=[{assign_plan: {average_bits: 5.0}}, emit, gptq]"], "passes.2.gptq: its codes are not emitted"),
    ([f"{QUICKSTART}.average_bits=4"], "average_bits 4 is below the smallest possible, 4.2500"),
    ([f"{QUICKSTART}.average_bits=9"], "average_bits 9 is above the largest possible, 8.2500"),
    ([f"{QUICKSTART}.max_bits={{'*': 4}}", f"{QUICKSTART}.average_bits=5"], "above the largest possible, 4.2500"),
    ([f"{QUICKSTART}.average_bits=null", f"{QUICKSTART}.budget_bytes=1000"], "budget_bytes 1,000 is below"),
    ([f"{QUICKSTART}.min_bits={{mlp_up: 8}}", f"{QUICKSTART}.max_bits={{mlp_up: 6}}"], "is above its max_bits, 6"),
    ([f"{QUICKSTART}.min_bits={{mlp_up: 8}}", f"{QUICKSTART}.max_bits={{'*.0.*': 6}}"], "leave none of the candidates"),
    (["passes.0=annotate_error", f"{QUICKSTART}.method=alpha"], "method alpha needs alpha: add `- annotate_alpha`"),
    (["passes.0=annotate_error", f"{QUICKSTART}.method=search"], "method search needs alpha: add `- annotate_alpha`"),
    ([f"{QUICKSTART}.rotate=auto"], "rotate auto: add `- insert_hadamard: {before: [plan]}` after `assign_plan`"),
    ([f"{QUICKSTART}.method=even", f"{QUICKSTART}.groups=[experts]"], "method even cannot honour groups"),
    ([f"{QUICKSTART}.method=uniform", f"{QUICKSTART}.average_bits=null"], "to choose among several candidates"),
    (["passes.1={assign_plan: {method: ratio, candidates: [int4]}}"], "method ratio needs 2 or 3 candidates"),
    (
        ["passes.1={assign_plan: {method: threshold, alpha_threshold: 3.0, candidates: [int2, int4, int8]}}"],
        "method threshold needs 2 candidates, there are 3",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), LATE)
def test_what_would_fail_late_is_told_by_check(
    overrides: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "quickstart", *overrides]) == 2
    assert sum(sentence in line for line in capsys.readouterr().err.splitlines()) == 1


def test_a_rotating_plan_that_is_carried_out_is_right(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = "{assign_plan: {average_bits: 5.0, rotate: auto}}"
    right = f"passes=[{plan}, {{insert_hadamard: {{before: [plan]}}}}, fuse_hadamard, quantize, emit]"
    assert cli.main(["check", "quickstart", right]) == 0
    late = f"passes=[{plan}, quantize, {{insert_hadamard: {{before: [plan]}}}}, emit]"
    assert cli.main(["check", "quickstart", late]) == 2
    assert "before rounding" in capsys.readouterr().err


def test_a_model_without_routers_is_told_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    dense = {key: value for key, value in OLMOE.items() if "expert" not in key} | {"model_type": "llama"}
    source = write_checkpoint(tmp_path / "dense", dense)
    assert cli.main(["check", "router_only", f"model.source={source}"]) == 2
    assert "passes.3.finetune_router: this model has no router to train" in capsys.readouterr().err
