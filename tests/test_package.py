"""Packages: compiled ahead of time, run by torch alone in Python and in C++, refused in sentences, kept by content."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import aqtx
from aqtx import cli
from aqtx.checkpoint import package_cache
from aqtx.checkpoint.exports.package import package
from aqtx.checkpoint.open import open_program
from aqtx.errors import InputError
from aqtx.formats import kernel
from aqtx.passes.assign_plan import AssignPlan
from aqtx.passes.emit import Emit
from aqtx.passes.quantize import Quantize
from aqtx.program.ahead_of_time import calls_of, compile_entry
from aqtx.program.cache_spec import CacheSpec, from_text, of_graph, to_text
from aqtx.program.generate import Generator
from aqtx.program.package import open_package, read_metadata
from tests.quantized_folders import quantized, with_tokenizer
from tests.tiny import OLMOE, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PROMPT, NEW = [11, 22, 33], 8
MIXED = {
    "*.self_attn.*": "int8",
    "lm_head": "int4",
    "*.mlp.experts.[01].*": "mxfp4",
    "*.mlp.experts.2.*": "int4_asym",
    "*.1.mlp.experts.0.*": "int3",
}
needs_kernel = pytest.mark.skipif(not kernel.available(), reason="experts need the compiled kernel")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Experts in two formats and one in bf16, in the second layer in one more; linears in two."""
    folder = tmp_path_factory.mktemp("package")
    return quantized(write_checkpoint(folder / "weights"), folder / "quantized", MIXED)


@pytest.fixture(scope="module")
def packaged(checkpoint):
    return package(checkpoint, checkpoint.parent / "model.pt2")


def refused(attempt) -> str:
    with pytest.raises(InputError) as told:
        attempt()
    [problem] = told.value.problems
    return problem


def test_what_is_in_the_way_is_refused_and_stays(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("model.pt2", "model.kernel.so"):
        (tmp_path / name).write_text("mine")
        assert (
            refused(lambda: package(checkpoint, tmp_path / "model.pt2"))
            == f"{tmp_path / name} exists; name another file"
        )
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert "must end in .pt2" in refused(lambda: package(checkpoint, tmp_path / "model"))
    assert "no entry 'steps'" in refused(lambda: package(checkpoint, tmp_path / "model.pt2", entry="steps"))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_what_was_written_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint, folder)
    [file] = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "its SHA-256 differs" in refused(lambda: package(folder, tmp_path / "model.pt2"))
    assert list(tmp_path.iterdir()) == [folder]


@needs_kernel
def test_experts_that_the_kernel_does_not_decode_are_refused_before_it_is_compiled(tmp_path: Path) -> None:
    folder = quantized(write_checkpoint(tmp_path / "weights"), tmp_path / "q", {"*.experts.[01].*": "q4_k"})
    told = refused(lambda: compile_entry(aqtx.load(folder), "score", tmp_path / "model.pt2", {}))
    assert "q4_k" in told and "does not decode" in told


def test_what_only_python_runs_is_refused_before_it_is_compiled(tmp_path: Path) -> None:
    plan = {"default": {"wq": "int8", "aq": "int8_row"}, "overrides": []}
    program = aqtx.trace(write_checkpoint(tmp_path / "weights"))
    program = aqtx.run(program, [AssignPlan(method="manual", plan=plan), Quantize(), Emit()])
    told = refused(lambda: compile_entry(program, "score", tmp_path / "model.pt2", {}))
    assert "aqtx.quantize_activation" in told and "runs in Python only" in told


def test_a_file_is_opened_only_if_it_tells_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    assert "is no package" in refused(lambda: open_package(file))
    file.write_bytes(b"PK not a zip")
    assert "is no package" in refused(lambda: open_package(file))
    told = {"aqtx": "1", "torch": "1.0", "entry": "step", "device": "cpu", "caches": "", "tokens": "1", "positions": ""}
    for wanted, metadata in (
        (["torch 1.0", "package it again"], told),
        (["does not tell caches"], {**told, "caches": 3}),
    ):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model/data/aotinductor/model/x.wrapper_metadata.json", json.dumps(metadata))
        problem = refused(lambda: open_package(file))
        assert all(word in problem for word in wanted)


def test_cache_specs_are_written_and_read_back(checkpoint: Path) -> None:
    specs = [CacheSpec((2, None, 32), torch.bfloat16), CacheSpec((4, 16), torch.float32)]
    assert to_text(specs) == "bfloat16 2 slots 32; float32 4 16"
    assert from_text(to_text(specs)) == specs and from_text("") == []
    made = [spec.make(3, 5, torch.device("cpu")) for spec in specs]
    assert [tuple(part.shape) for part in made] == [(3, 2, 5, 32), (3, 4, 16)]
    wider = [spec.widen(part, 2) for spec, part in zip(specs, made, strict=True)]
    assert [spec.slots(part) for spec, part in zip(specs, wider, strict=True)] == [7, None]
    assert of_graph(open_program(checkpoint, None).entry("step")) == [specs[0]] * 4  # two layers, keys and values


def test_a_kept_package_is_named_by_content_and_never_run_unless_trusted(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("AQTX_CACHE_DIR", str(tmp_path / "cache"))
    cpu = torch.device("cpu")
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    name = package_cache._name(folder, cpu)
    assert name == package_cache._name(checkpoint, cpu)
    assert package_cache.find(folder, cpu) is None
    (tmp_path / "cache" / name).write_bytes(b"somebody else's code")  # no digest of ours beside it
    assert package_cache.find(folder, cpu) is None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert package_cache._name(folder, cpu) != name


@pytest.mark.slow
@needs_kernel
def test_a_package_is_as_near_to_exact_arithmetic_as_the_model(checkpoint: Path, packaged) -> None:
    """Both round the same function to bf16, at other places: neither may be further from float32 than the other.

    Over hundreds of logits two RMS errors of independent roundings differ by a few percent; half as much again is far.
    """
    made = open_package(packaged.path)
    ids = torch.randint(0, 192, (2, 8), generator=torch.Generator().manual_seed(1))

    def stepped(step, specs: list[CacheSpec]) -> torch.Tensor:
        cache = [spec.make(2, 8, torch.device("cpu")) for spec in specs]
        start = torch.tensor([0, 2])  # the second sequence begins with padding
        parts = [step(ids[:, at], torch.arange(8)[at], start, cache) for at in (slice(0, 7), slice(7, 8))]
        return torch.cat(parts, dim=1)[[0, 0, 1], [0, 7, 7]].double()

    with torch.no_grad():
        exact = open_program(checkpoint, torch.float32)
        reference = stepped(exact.module("step"), of_graph(exact.entry("step")))
        eager = stepped(open_program(checkpoint, None).module("step"), made.caches)
    compiled = stepped(made.step, made.caches)
    assert (compiled - reference).norm() <= 1.5 * (eager - reference).norm()
    assert not torch.equal(compiled, torch.zeros_like(compiled))


ALONE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
run = torch._inductor.aoti_load_package(sys.argv[2])
ids, length = torch.tensor([[11, 22, 33]]), 3
cache = [torch.zeros(1, 2, 11, 32, dtype=torch.bfloat16) for _ in range(4)]
pos, made = torch.arange(3), []
for at in range(3, 11):
    ids = run(ids, pos, torch.zeros(1, dtype=torch.long), cache)[:, -1].argmax(-1, keepdim=True)
    pos = torch.tensor([at])
    made.append(int(ids))
print(*made)
assert not [name for name in sys.modules if name.split(".")[0] in ("aqtx", "torchao", "transformers")]
"""


@pytest.mark.slow
@needs_kernel
def test_torch_alone_runs_it_and_so_does_cpp(packaged, tmp_path: Path) -> None:
    """Neither imports aqtx; the C++ example is built by the command at its head."""
    made = open_package(packaged.path)
    [tokens] = Generator.over(made).continue_greedily([PROMPT], max_new_tokens=NEW)
    command = [sys.executable, "-c", ALONE, str(packaged.kernel), str(packaged.path)]
    alone = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert [int(word) for word in alone.stdout.split()] == tokens
    source = ROOT / "recipes" / "run_package.cpp"
    build = (
        next(line for line in source.read_text().splitlines() if "g++" in line).removeprefix("//").replace("$T", "{T}")
    )
    build = build.format(T=torch.__path__[0]).replace("run_package.cpp", str(source)).replace("-O2", "-O0")
    subprocess.run(build.split(), check=True, cwd=tmp_path)
    words = [str(tmp_path / "run_package"), str(packaged.path), str(NEW), *map(str, PROMPT)]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    assert [int(word) for word in ran.stdout.split()] == tokens


@pytest.mark.slow
@needs_kernel
def test_what_a_package_tells_of_itself(packaged) -> None:
    told = read_metadata(packaged.path)
    assert told["entry"] == "step" and told["caches"] == "; ".join(["bfloat16 2 slots 32"] * 4)
    made = open_package(packaged.path)
    with pytest.raises(InputError, match="the token 192, but the model's embedding has the tokens 0 to 191"):
        Generator.over(made).continue_greedily([[192]], max_new_tokens=1)
    assert calls_of(packaged.path) == {"aqtx_cpu::linear", "aqtx_cpu::experts", "aqtx_cpu::attention"}


@pytest.mark.slow
def test_without_the_kernel_a_dense_model_is_plain_torch_and_experts_are_refused(tmp_path: Path) -> None:
    llama = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 192,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
    }  # fmt: skip
    environment = {**os.environ, "AQTX_KERNEL": "off", "PYTHONPATH": str(ROOT)}
    dense = quantized(write_checkpoint(tmp_path / "weights", llama), tmp_path / "dense", {"*_proj": "int4"})
    experts = write_checkpoint(tmp_path / "experts")
    ran = {}
    for source in (dense, experts):
        words = ["package", str(source), str(tmp_path / f"{source.name}.pt2"), "--entry", "score"]
        command = [sys.executable, "-m", "aqtx", *words]
        ran[source] = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran[dense].returncode == 0, ran[dense].stderr
    assert calls_of(tmp_path / "dense.pt2") == set() and not (tmp_path / "dense.kernel.so").exists()
    ids = torch.arange(12).view(2, 6)
    scored = open_package(tmp_path / "dense.pt2").score(ids)
    reference = open_program(dense, None).module("score")(ids)
    # rounding to bf16 alone moves logits by 2^-9 an op; three ops in a row on the way of the residual stream
    assert (scored - reference).double().norm() <= 3 * 2**-8 * reference.double().norm()
    assert ran[experts].returncode == 2 and "need the compiled kernel" in ran[experts].stderr


@pytest.mark.slow
@needs_kernel
def test_generate_keeps_what_it_compiled_and_takes_it_next_time(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("AQTX_CACHE_DIR", str(tmp_path / "cache"))
    source = with_tokenizer(write_checkpoint(tmp_path / "weights", OLMOE | {"vocab_size": 3072}))
    words = ["generate", str(source), "--prompt", "In the beginning", "--max-new-tokens", "4", "--device", "cpu"]
    told = []
    for options in (["--no-compile"], ["--compile"], [], ["--compile"]):
        assert cli.main([*words, *options]) == 0
        told.append(capsys.readouterr())
    assert ["compiling" in one.err and "kept as" in one.err for one in told] == [False, True, False, False]
    assert told[1].out == told[2].out == told[3].out
    assert all(one.out.startswith("In the beginning") and "the first after" in one.err for one in told)
    [kept] = (tmp_path / "cache").glob("step-*.pt2")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert package_cache.find(source, torch.device("cpu")) is None, "a damaged package is not run"
