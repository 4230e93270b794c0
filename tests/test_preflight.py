"""What a recipe gets wrong about its model or its texts is told before anything runs, all of it at once."""

import pytest

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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=-1", "seed: must be 0 or more"),
        (f"seed={2**64}", "64 bits"),
        (f"passes.4={{insert_hadamard: {{block: {2**70}}}}}", "block: expected an integer"),
        (f"passes.4={{insert_hadamard: {{block: {2**62}}}}}", "no Hadamard matrix of order"),
        ("passes.4={insert_hadamard: {seed: -1}}", "seed: must be 0 or more"),
        (f"{PLAN}.pins={{3: int4}}", "pins: keys must be text, not 3"),
        ("calibration.source=/dev/zero", "is a pipe or a device"),
        ("evaluate.perplexity=/dev/stdin", "is a pipe or a device"),
        ("calibration.source=" + "a" * 5000, "is neither a file"),
        ("calibration.sequence_length=9999999999999", "are more than 2,000,000,000 tokens"),
    ],
)
def test_numbers_without_end_and_devices_are_told_by_check(override, words, capsys):
    assert cli.main(["check", "quickstart", override]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "tinymoe", "--seed", "-1"],
        ["generate", "tinymoe", "--prompt", "x", "--seed", str(2**64)],
        ["generate", "tinymoe", "--prompt", "x", "--max-new-tokens", str(10**12)],
    ],
)
def test_arguments_without_end(words, capsys):
    assert cli.main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("aqtx: error: ")
