"""What a user gets wrong about a model, a plan or a folder: one sentence that names it, status 2, nothing lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aqtx import cli
from aqtx.checkpoint.locate import shipped

UP = "model.layers.2.mlp.experts.5.up_proj.weight"
PLAN = "passes.1.assign_plan"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Copies of the shipped model, each with one thing wrong."""
    root = tmp_path_factory.mktemp("damaged")
    source = shipped()["tinymoe"]
    tensors = load_file(source / "model.safetensors")

    def write(name: str, changed: dict[str, torch.Tensor], **config: object) -> None:
        folder = root / name
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("text", "*.png", "*.md", "*.safetensors"))
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**told, **config}))

    write("missing", {name: tensor for name, tensor in tensors.items() if name != UP})
    nan = tensors[UP].clone()
    nan[3, 7] = float("nan")
    write("nan", {**tensors, UP: nan})
    write("shape", {**tensors, UP: tensors[UP][:-1].clone()})
    write("unknown", tensors, model_type="rwkv9000")
    (root / "pickled").mkdir()
    (root / "pickled" / "config.json").write_text((source / "config.json").read_text())
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    (root / "empty").mkdir()
    return root


def errors(capsys, *words: str) -> tuple[int, list[str]]:
    """Exit status and the problems told; every line on standard error must be one."""
    status = cli.main(words)
    captured = capsys.readouterr()
    assert captured.out == "" or captured.out.startswith("stage "), "nothing but what a run will take may come first"
    lines = captured.err.splitlines()
    assert [line for line in lines if not line.startswith("aqtx: error: ")] == []
    return status, [line.removeprefix("aqtx: error: ") for line in lines]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("missing", [UP, "missing"]),
        ("nan", [UP.removesuffix(".weight"), "NaN"]),
        ("shape", [UP, "127", "128"]),
        ("unknown", ["rwkv9000"]),
        ("pickled", ["pytorch_model.bin", "save_pretrained"]),
        ("empty", ["config.json"]),
        ("nowhere", ["neither a folder nor a shipped model"]),
    ],
)
def test_a_model_that_cannot_be_used(model, words, damaged, tmp_path, capsys):
    output = tmp_path / "run"
    status, problems = errors(
        capsys, "apply", "quickstart", f"model.source={damaged / model}", f"output={output}", "evaluate=null"
    )
    assert status == 2
    assert [word for word in words if not any(word in problem for problem in problems)] == []
    assert not output.exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"{PLAN}.candidates=[mxfp5]", ["unknown format 'mxfp5'", "did you mean 'mxfp"]),
        (f"{PLAN}.keep=['*.mlp.experts.77.*']", ["*.mlp.experts.77.*", "match"]),
        (f"{PLAN}.keep=[atention]", ["atention", "attention"]),
        (f"{PLAN}.average_bits=2.0", ["average_bits", "4.25"]),
        (f"{PLAN}.budget_bytes=1000", ["average_bits and budget_bytes are both given"]),
        (f"{PLAN}={{method: alpha, budget_bytes: 1000}}", ["budget", "1,000"]),
        (f"{PLAN}.activations=mxfp9", ["unknown format 'mxfp9'"]),
        ("calibration.num_sequences=100000", ["calibration", "100000"]),
        ("calibration.source=nowhere.txt", ["nowhere.txt"]),
        ("evaluate.perplexity=wikitext3", ["wikitext3"]),
        ("device=cuda", ["device"]),
    ],
)
def test_a_recipe_that_cannot_be_met(override, words, tmp_path, capsys):
    if override == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    evaluate = [] if "evaluate" in override else ["evaluate=null"]
    status, problems = errors(capsys, "apply", "quickstart", f"output={tmp_path / 'run'}", override, *evaluate)
    assert status == 2
    assert [word for word in words if not any(word in problem for problem in problems)] == []
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_holds_something_is_not_touched(tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "thesis.txt").write_text("three years of work")
    status, [problem] = errors(capsys, "apply", "quickstart", f"output={output}")
    assert status == 2
    assert "--overwrite" in problem
    assert Path(output / "thesis.txt").read_text() == "three years of work"


def test_reports_exports_and_evaluations_of_nothing(tmp_path, capsys):
    for words in (
        ("report", str(tmp_path)),
        ("export", str(tmp_path), "--to", "dequantized"),
        ("generate", str(tmp_path), "--prompt", "x"),
        ("package", str(tmp_path), str(tmp_path / "model.pt2")),
        ("package", "tinymoe", str(tmp_path / "model.so")),
        ("eval", str(tmp_path)),
        ("eval", "tinymoe", "--plan", str(tmp_path / "none.json")),
        ("eval", "tinymoe", "--perplexity", "none", "--tasks", "helaswag", "--include-path", str(tmp_path)),
        ("plan", "quickstart", "--expand", str(tmp_path / "none.json")),
        ("generate", "tinymoe", "--prompt", "x", "--max-new-tokens", "0"),
    ):
        status, problems = errors(capsys, *words)
        assert (status, len(problems)) == (2, 1), words


def test_places_that_cannot_be_written_and_counts_below_one(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for words in (
        ("apply", "quickstart", f"output={file / 'run'}"),
        ("eval", "tinymoe", "--max-tokens", "300", "--to", str(file)),
        ("export", "tinymoe", "--to", "dequantized", "--output", str(file)),
        ("eval", "tinymoe", "--window", "0"),
        ("eval", "tinymoe", "--batch-size", "0"),
    ):
        status, problems = errors(capsys, *words)
        assert (status, len(problems)) == (2, 1), words
    assert file.read_text() == "mine"
