"""Plans, texts, recipes, states and reports in a thousand malformed versions, by seed: used, or refused in words."""

import json
import random

import pytest
import yaml

from aqtx import cli
from aqtx.evaluate.perplexity import DocumentScores
from aqtx.machine.files import read_record, write_record
from aqtx.planning.manual import read_manual
from aqtx.program.edits import edit_from_json
from aqtx.program.plan import Plan
from aqtx.report.write import write_report
from aqtx.runs.opening import program_of, recipe_context
from aqtx.runs.pipeline import Run
from aqtx.runs.recipe import load_recipe, parse_recipe, shipped_recipes
from aqtx.runs.resume_points import restore_state, save_state
from aqtx.text.sources import read_passages
from tests.mutations import damaged, mutations, refused
from tests.tiny import OLMOE, write_checkpoint

ROUNDS = 1000
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}


PLANS = (
    {"default": {"wq": "mxfp8", "aq": "mxfp8", "group_size": 32}, "overrides": [{"pattern": "*", "wq": "int4"}]},
    {"a.b": {"wq": "mxfp6", "extra": {"format": "e3m2"}}, "c": "int8"},
    {
        "method": "alpha",
        "budget": {"average_bits": 4.0},
        "average_bits": 4.0,
        "cost": 1.0,
        "bound": 1.0,
        "gap": 0.0,
        "warnings": ["few"],
        "sites": {
            "a.b": {"format": "int4", "category": "other", "numel": 64, "bytes": 32, "alpha": 2.0, "error": 0.1},
            "c": {"format": None, "why": "kept"},
        },
    },
)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("plan", PLANS)
def test_plans(plan, seed):
    cases = mutations(plan, ROUNDS // 2, seed)
    assert sum(refused(read_manual, content, ["a.b", "c"]) for content in cases) > 0.15 * ROUNDS


@pytest.mark.parametrize("plan", [{"default": 3}, {"default": {"wq": "int4"}, "overrides": [3]}])
def test_plans_by_hand_whose_layers_are_no_mappings(plan):
    assert refused(read_manual, plan, ["a"]) == 1
    assert refused(read_manual, {"default": {"wq": "mxfp6", "extra": 3}}, ["a"]) == 1


def test_a_plan_names_every_entry_that_is_of_another_type():
    with pytest.raises(ValueError, match=r"plan\.sites\.a\.b\.bytes: expected an integer, got 'x'"):
        Plan.from_json({**PLANS[2], "sites": {"a.b": {"format": "int4", "bytes": "x"}}})


EDITS = (
    {"edit": "hadamard", "weight": "w", "block": 32, "seed": None},
    {"edit": "quantize_activation", "weight": "w", "formats": ["mxfp8_e4m3"]},
)


@pytest.mark.parametrize("edit", EDITS)
def test_structural_edits(edit):
    assert sum(refused(edit_from_json, content) for content in mutations(edit, ROUNDS)) > 0.5 * ROUNDS


@pytest.mark.parametrize("seed", SEEDS)
def test_lines_of_text(tmp_path, seed):
    file = tmp_path / "text.jsonl"
    for row in ({"text": "words", "domain": "a"}, {"ids": [1, 2, 3], "domain": "b"}):
        for content in mutations(row, ROUNDS, seed):
            file.write_text(json.dumps(content) + "\n")
            refused(read_passages, str(file), "calibration")


@pytest.mark.parametrize("seed", SEEDS)
def test_recipes(tmp_path, seed):
    documents = [yaml.safe_load(file.read_text()) for file in shipped_recipes().values()]
    rounds = ROUNDS // len(documents) + 1
    told = sum(refused(parse_recipe, content) for one in documents for content in mutations(one, rounds, seed))
    assert told > 0.4 * ROUNDS
    file, whole = tmp_path / "recipe.yaml", shipped_recipes()["quickstart"].read_bytes()
    for data in damaged(whole, ROUNDS // 5, seed):
        file.write_bytes(data)
        refused(load_recipe, file)


@pytest.mark.parametrize("rounds", [20, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_resume_states_that_another_program_wrote(tmp_path, rounds):
    source = write_checkpoint(tmp_path / "source", {**OLMOE, "num_hidden_layers": 1, "num_experts": 2})
    plan = {"assign_plan": {"method": "uniform", "candidates": ["mxfp6"]}}
    passes = ["annotate_error", "fold_norms", {"insert_hadamard": {"block": 32}}, plan]
    recipe = parse_recipe({"version": 1, "model": {"source": str(source)}, "passes": passes})
    program = program_of(recipe)
    run = Run(program, recipe_context(recipe, program, work=tmp_path, quiet=True))
    run.execute(recipe.passes)
    save_state(program, [row.to_json() for row in run.rows], tmp_path)
    whole = read_record(tmp_path / "state.json")
    fresh = program_of(recipe)

    def read(content: object) -> None:
        write_record(tmp_path / "state.json", content)
        fresh.history.clear()
        fresh.edits.clear()
        restore_state(fresh, tmp_path)

    assert refused(read, whole) == 0
    assert sum(refused(read, content) for content in mutations(whole, rounds)) > 0.2 * rounds


def test_scores_that_another_program_wrote():
    scores = {"domains": ["a", "b"], "nll": [1.0, 2.0], "num_tokens": [3, 4], "window": 5, "context": 0}
    assert DocumentScores.from_json(scores).mean == 3 / 7
    cases = mutations(scores, ROUNDS)
    assert sum(refused(DocumentScores.from_json, content) for content in cases) > 0.8 * ROUNDS


INTERVAL = {"value": 0.1, "low": 0.0, "high": 0.2}
REPORT = {
    "name": "run",
    "bytes": {"before": 10, "after": 5},
    "weights": {"total": 3, "quantized": 2, "kept": 1, "refused": 0},
    "tasks": {"a": {"metric": "acc", "num_items": 3, **dict.fromkeys(("before", "after", "change"), INTERVAL)}},
    "passes": [{"name": "emit", "seconds": 0.1, "changed": 3, "refused": [{"site": "a", "why": "b"}], "details": {}}],
    "settings": {"model": {"source": "tinymoe"}, "passes": ["emit"]},
    "versions": {"torch": "2"},
}
TOLD = dict.fromkeys(("before", "after", "change"), INTERVAL)


@pytest.mark.parametrize("rounds", [ROUNDS // 4, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_reports(tmp_path, rounds):
    file = tmp_path / "report.json"

    def read(content: object) -> None:
        file.write_text(json.dumps(content))
        write_report(tmp_path)

    assert refused(read, REPORT) == 0
    assert sum(refused(read, content) for content in mutations(REPORT, rounds)) > 0.2 * rounds
    drawn = {"name": "run", "perplexity": TOLD, "perplexity_by_domain": {"a": TOLD, "b": TOLD}}
    for content in mutations(drawn, rounds // 50):
        refused(read, content)


def test_a_report_that_cannot_be_made_leaves_the_one_that_is_there(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"name": "run", "perplexity": TOLD}))
    write_report(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    (tmp_path / "report.json").write_text('{"perplexity": {"before": 3}, "passes": 3}')
    assert cli.main(["report", str(tmp_path)]) == 2
    assert all(file.read_bytes() == data for file, data in before.items() if file.name != "report.json")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_of_something_malformed_writes_nothing(tmp_path, capsys, seed):
    folder, generator = write_checkpoint(tmp_path / "source"), random.Random(seed)
    text, plan = tmp_path / "text.jsonl", tmp_path / "plan.json"
    text.write_text('{"ids": [null]}')
    plan.write_text(json.dumps({"default": 3}))
    broken = generator.choice(sorted(key for key in OLMOE if key not in ("architectures", "hidden_act")))
    config = {**OLMOE, broken: [None]}
    before = sorted(path.name for path in tmp_path.iterdir())
    for words in (
        [f"calibration.source={text}", "passes=[{gptq: {}}]"],
        ["passes.1.assign_plan={method: manual, plan: " + str(plan) + "}"],
        ["x..y=3"],
    ):
        words = ["apply", "quickstart", f"output={tmp_path / 'out'}", "evaluate=null", *words]
        assert cli.main(words) == 2, words
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["apply", "quickstart", f"model.source={folder}", f"output={tmp_path / 'out'}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("aqtx: error: ")] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before
