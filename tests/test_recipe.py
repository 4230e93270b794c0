"""Recipes: what is read, what is overridden, and every mistake in a sentence of its own."""

import pytest
import yaml

from aqtx.errors import InputError
from aqtx.registry import PASSES
from aqtx.runs.recipe import Recipe, find_recipe, load_recipe, parse_recipe, shipped_recipes
from aqtx.runs.yaml_text import parse_overrides, parse_yaml

MINIMAL = {"version": 1, "model": {"source": "tinymoe"}}


def problems_of(document, overrides=None) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_recipe(document, overrides)
    return caught.value.problems


def test_a_minimal_recipe_takes_every_default():
    recipe = parse_recipe(MINIMAL)
    assert recipe == Recipe(version=1, model=recipe.model)
    assert (recipe.seed, recipe.device, recipe.output, recipe.passes, recipe.evaluate) == (0, "auto", None, (), None)
    assert recipe.model.dtype == "auto"


def test_an_empty_section_means_its_defaults():
    recipe = parse_recipe({**MINIMAL, "calibration": None, "passes": None, "evaluate": {}})
    assert recipe.calibration == parse_recipe(MINIMAL).calibration
    assert recipe.evaluate is not None
    assert recipe.evaluate.perplexity is None


def test_passes_keep_their_order_and_may_come_twice():
    entries = ["annotate_alpha", {"assign_plan": {"method": "uniform", "candidates": ["mxfp4"]}}, "quantize", "emit"]
    recipe = parse_recipe({**MINIMAL, "passes": [*entries, {"emit": None}]})
    assert [step.name for step in recipe.passes] == ["annotate_alpha", "assign_plan", "quantize", "emit", "emit"]
    assert all(type(step) is PASSES[step.name] for step in recipe.passes)


def test_every_problem_of_a_recipe_is_told_at_once():
    document = {
        "version": 2,
        "sed": 1,
        "model": {"dtype": "bf16"},
        "calibration": {"num_sequences": 0},
        "passes": [
            "annotat_alpha",
            {"assign_plan": {"average_bit": 5.0}},
            {"emit": None, "gptq": None},
            7,
            {"emit": 3},
        ],
        "evaluate": {"batch_size": 0},
        "report": "yes please",
    }
    assert problems_of(document) == [
        "sed: unknown key, did you mean 'seed'?",
        "version: expected 1, got 2",
        "model.source: this key is required",
        "model.dtype: expected one of auto, bfloat16, float16, float32, got 'bf16', did you mean 'bfloat16'?",
        "calibration: num_sequences is 0, but must be at least 1",
        "evaluate: batch_size: must be at least 1, got 0",
        "report: expected true or false, got 'yes please'",
        "passes.0: unknown pass 'annotat_alpha', did you mean 'annotate_alpha'?; `aqtx ls passes` lists them",
        "passes.1.assign_plan.average_bit: unknown key, did you mean 'average_bits'?",
        "passes.2: expected one pass per entry, got emit, gptq; start each with its own `-`",
        "passes.3: expected a pass, such as `emit` or `gptq: {damp_fraction: 0.01}`, got 7",
        "passes.4: the fields of 'emit' must be a mapping, got 3",
    ]


def test_a_pass_that_lacks_the_one_before_it_says_which():
    [problem] = problems_of({**MINIMAL, "passes": ["quantize"]})
    assert problem == "passes.0.quantize: needs 'assign_plan' before it; add `- assign_plan` above"


def test_resolved_writes_every_default_and_no_output_path():
    document = {**MINIMAL, "output": "out/here", "evaluate": {"perplexity": "builtin"}, "passes": ["emit"]}
    resolved = parse_recipe(document).resolved()
    assert "output" not in resolved
    assert resolved["calibration"] == {
        "source": "builtin",
        "num_sequences": 64,
        "sequence_length": 256,
        "tau": None,
        "temperature": 1.0,
        "starts": "frequency",
    }
    assert resolved["evaluate"]["batch_size"] == 8
    assert resolved["passes"] == ["emit"]
    assert resolved == parse_recipe({**document, "output": "elsewhere"}).resolved()
    again = parse_recipe(yaml.safe_load(yaml.safe_dump(resolved)))
    assert again.resolved() == resolved


def test_overrides_reach_every_place():
    entries = ["annotate_alpha", {"assign_plan": {"method": "uniform", "candidates": ["mxfp4"]}}, "quantize", "emit"]
    overrides = {
        "seed": 7,
        "calibration.num_sequences": 3,  # a section that the recipe leaves out
        "passes.0.annotate_alpha.k_fraction": 0.5,  # a pass written as its bare name
        "passes.1.assign_plan.candidates": ["int4"],
        "passes.4": "emit",  # one past the end appends
        "report": False,
    }
    recipe = parse_recipe({**MINIMAL, "passes": entries}, overrides)
    assert (recipe.seed, recipe.calibration.num_sequences, recipe.report) == (7, 3, False)
    assert recipe.passes[0] == PASSES["annotate_alpha"](k_fraction=0.5)
    assert recipe.resolved()["passes"][1]["assign_plan"]["candidates"] == ["int4"]
    assert recipe.passes[4].name == "emit"


def test_overrides_leave_the_document_alone():
    document = {**MINIMAL, "calibration": {"num_sequences": 4}}
    parse_recipe(document, {"calibration.num_sequences": 8})
    assert document["calibration"] == {"num_sequences": 4}


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"passes.9.emit.x": 1}, "override passes.9.emit.x: '9' is not an index of this list, which has 1 entries"),
        ({"passes.first": 1}, "override passes.first: 'first' is not an index of this list, which has 1 entries"),
        ({"version.x": 1}, "override version.x: 'x' has no place inside 1"),
        ({"model.sorce": "x"}, "model.sorce: unknown key, did you mean 'source'?"),
        ({"passes.0.quantize.x": 1}, "passes.0: expected one pass per entry, got emit, quantize"),
    ],
)
def test_an_override_without_a_place_is_told(overrides, problem):
    [found] = problems_of({**MINIMAL, "passes": [{"emit": {}}]}, overrides)
    assert found.startswith(problem)


def test_overrides_on_the_command_line_are_yaml():
    words = ["a=1", "b=4.5", "c=[x, y]", "d=null", "e=true", "f=1e-4", "g=text with = in it", "h={k: 2}", "i="]
    assert parse_overrides(words) == {
        "a": 1,
        "b": 4.5,
        "c": ["x", "y"],
        "d": None,
        "e": True,
        "f": 1e-4,  # YAML 1.1 would read text
        "g": "text with = in it",
        "h": {"k": 2},
        "i": None,
    }
    with pytest.raises(InputError) as caught:
        parse_overrides(["--overwrit", "seed", "a=[1"])
    assert [problem.split(";")[0] for problem in caught.value.problems[:2]] == [
        "'--overwrit' is not an override",
        "'seed' is not an override",
    ]
    assert "override a, line 1, column" in caught.value.problems[2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml, line 3: the key 'a' stands here twice"),
        ("a: {x: 1, x: 2}\n", "r.yaml, line 1: the key 'x' stands here twice"),
        ("a: [1, 2\n", "r.yaml, line 2, column 1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (
            "a: !!python/object/apply:os.getcwd []\n",
            "r.yaml, line 1, column 4: not valid YAML: could not determine a const",
        ),
        ("a: 1\n---\nb: 2\n", "r.yaml, line 2, column 1: not valid YAML: but found another document"),
        ("a: @\n", "r.yaml, line 1, column 4: not valid YAML: found character '@' that cannot start any token"),
        ("{[1]: 2}\n", "r.yaml, line 1, column 2: not valid YAML: found unhashable key"),
        ("a: \x00\n", "r.yaml: not valid YAML: unacceptable character"),
    ],
)
def test_bad_yaml_names_its_line(text, problem):
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "r.yaml")
    assert caught.value.problems[0].startswith(problem)


def test_merge_keys_are_no_duplicates():
    assert parse_yaml("a: &x {p: 1, q: 2}\nb: {<<: *x, p: 3}\n", "r")["b"] == {"p": 3, "q": 2}


def test_a_recipe_that_is_no_mapping_or_not_there(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- emit\n")
    with pytest.raises(InputError, match="a recipe is a mapping with the keys version, seed"):
        load_recipe(path)
    with pytest.raises(InputError, match="no shipped recipe of that name, did you mean 'quickstart'"):
        find_recipe("quickstat")


def test_every_shipped_recipe_loads_and_names_its_own_command():
    recipes = shipped_recipes()
    assert len(recipes) == 11
    for name, path in recipes.items():
        load_recipe(name)
        command = "study" if name == "study" else "apply"
        assert path.read_text().startswith(f"# aqtx {command} {name}\n# ")
