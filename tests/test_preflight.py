"""What a recipe gets wrong about its model or its texts is told before anything runs, all of it at once."""

from aqtx import cli

PLAN = "passes.1.assign_plan"


def test_check_holds_the_recipe_against_model_and_texts(tmp_path, capsys):
    overrides = [
        f"{PLAN}.keep=[atention, 're:(', '*.experts.77.*']",
        f"{PLAN}.pins={{'*.nowhere': int4}}",
        "passes.4={insert_hadamard: {before: ['*.elsewhere']}}",
        "calibration.source=nowhere.txt",
        "evaluate.perplexity=wikitext3",
        f"evaluate.include_path={tmp_path / 'no_tasks'}",
    ]
    assert cli.main(["check", "quickstart", *overrides]) == 2
    told = capsys.readouterr().err.splitlines()
    words = ("atention", "re:(", "experts.77", "*.nowhere", "*.elsewhere", "nowhere.txt", "wikitext3", "no_tasks")
    assert [word for word in words if sum(word in line for line in told) != 1] == []


def test_an_unfit_recipe_leaves_no_unfinished_run(tmp_path, capsys):
    output = tmp_path / "run"
    assert cli.main(["apply", "quickstart", f"{PLAN}.keep=[atention]", f"output={output}"]) == 2
    assert cli.main(["apply", "quickstart", f"{PLAN}.method=manual", f"{PLAN}.plan=none.json", f"output={output}"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_one_section_hides_none_in_another(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "version: 1\nsed: 3\nmodel: {source: tinymoe}\ncalibration: {num_sequences: 0}\nevaluate: {window: 0}"
    )
    assert cli.main(["check", str(file)]) == 2
    told = capsys.readouterr().err
    assert [word for word in ("sed", "num_sequences", "window") if word not in told] == []


def test_a_recipe_that_is_no_text(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    assert cli.main(["check", str(file)]) == 2
    assert "cannot be read as text" in capsys.readouterr().err
