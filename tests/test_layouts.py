"""Every layout in which a family lies on disk: read as transformers reads it, one tensor at a time, errors by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import SMALL, oracle, randomize
from safetensors.torch import load_file, save_file
from torch import nn

import aqtx
from aqtx.checkpoint.huggingface.layout import layout_of
from aqtx.checkpoint.huggingface.skeleton import canonical_tensors
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.errors import InputError
from aqtx.machine.memory import PeakMemory, resident_bytes
from tests.marks import slow

MOE = {"num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Between them every way in which experts lie on disk: one by one or fused, gate and up apart or together, turned,
# alternating, under older names, with other prefixes; and dense models whose conversions cut or join matrices.
TRACED = ("gpt_oss", "granitemoe", "phimoe", "jetmoe", "minimax_m2", "afmoe", "qwen3_5_moe_text", "gpt2", "falcon")


def theirs(model_type: str) -> nn.Module:
    """transformers' model with two layers and random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(SMALL | MOE | {"num_hidden_layers": 2}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("model_type", TRACED)
def test_every_parameter_is_what_transformers_reads(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = theirs(model_type)
    for original in (True, False):
        folder = tmp_path / str(original)
        model.save_pretrained(folder, save_original_format=original)
        wanted = canonical_tensors(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        pieces = layout_of(CheckpointReader(folder), json.loads((folder / "config.json").read_text())).pieces
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        assert pieces.keys() == wanted.keys() - tied
        assert [name for name, piece in pieces.items() if not torch.equal(piece.read(), wanted[name])] == []
        stacks = [name for name in pieces if "experts." in name and len(pieces[name].shape) == 3]
        assert [name for name in stacks if not torch.equal(pieces[name].select(0, 5).read(), wanted[name][5])] == []


@pytest.mark.parametrize("name", ["mixtral", *slow("olmoe", "qwen2-moe", "qwen3-moe", "deepseek-v3")])
def test_own_families_read_experts_fused_on_disk(name: str, tmp_path: Path) -> None:
    """As transformers 5 holds them: `gate_up_proj` and `down_proj` of three dimensions."""
    model = oracle(name, num_hidden_layers=2)
    for original in (True, False):
        model.save_pretrained(tmp_path / str(original), save_original_format=original)
    apart, fused = (aqtx.trace(tmp_path / str(original)) for original in (True, False))
    assert any(key.endswith("experts.gate_up_proj") for key in CheckpointReader(tmp_path / "False").entries)
    assert apart.weights.names() == fused.weights.names()
    unlike = [key for key in apart.weights.names() if not torch.equal(apart.weights.get(key), fused.weights.get(key))]
    assert unlike == []
    assert [site.name for site in apart.sites()] == [site.name for site in fused.sites()]
    matrices = [(apart.read(one), fused.read(other)) for one, other in zip(apart.sites(), fused.sites(), strict=True)]
    assert all(torch.equal(one, other) for one, other in matrices)


def changed(folder: Path, drop: str = "", **tensors: torch.Tensor) -> Path:
    """The folder with one tensor fewer and others put in."""
    found = load_file(folder / "model.safetensors")
    found.pop(drop, None)
    save_file(found | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def granite(tmp_path: Path) -> Path:
    theirs("granitemoe").save_pretrained(tmp_path)
    return tmp_path


def test_what_is_missing_is_named(granite: Path) -> None:
    changed(granite, "model.layers.1.block_sparse_moe.input_linear.weight")
    with pytest.raises(InputError, match=r"tensor model\.layers\.1\.block_sparse_moe\.experts\.gate_up_proj is miss"):
        aqtx.trace(granite)


def test_a_missing_expert_is_named_as_it_lies_on_disk(tmp_path: Path) -> None:
    theirs("phimoe").save_pretrained(tmp_path)
    changed(tmp_path, "model.layers.0.block_sparse_moe.experts.3.w3.weight")
    with pytest.raises(InputError, match=r"tensor model\.layers\.0\.block_sparse_moe\.experts\.3\.w3\.weight is miss"):
        aqtx.trace(tmp_path)


def test_what_belongs_to_nothing_and_what_does_not_fit_is_named(granite: Path) -> None:
    name = "model.layers.0.block_sparse_moe.output_linear.weight"
    changed(granite, **{"model.extra": torch.ones(2), name: torch.ones(8, 64, 16)})
    with pytest.raises(InputError) as told:
        aqtx.trace(granite)
    said = " ".join(told.value.problems)
    assert "tensor model.extra belongs to no parameter of the model" in said
    assert "experts.down_proj has shape [8, 64, 16], config.json asks for [8, 64, 48]" in said


SIZE, EXPERTS, LAYERS = 512, 64, 1
LARGE = {
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "moe_intermediate_size": SIZE,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
}
MATRIX = SIZE * SIZE * 4  # bytes of the float32 copy that a pass reads


def write_large(folder: Path, model_type: str, *, original: bool) -> None:
    """A random bf16 checkpoint, about 100 MB of it experts, in one of transformers' layouts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **LARGE)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, save_original_format=original)


def pack_experts(folder: Path) -> None:
    """gpt-oss's experts as random MXFP4 bytes, under scales near 1."""
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(key).shape
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(120, 128, (experts, rows, columns // 32), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))


def read_all(folder: str) -> dict[str, int]:
    """Bytes that opening takes, that reading every matrix takes beyond it, and that are read."""
    start = resident_bytes()
    program = aqtx.trace(folder)
    opened, total = resident_bytes(), 0
    with PeakMemory(0.001) as peak:
        for site in program.sites():
            total += 2 * program.read(site).numel()
    return {"opened": opened - start, "read": peak.num_bytes - opened, "total": total}


LAYOUTS = {
    "qwen3_moe, one by one": ("qwen3_moe", True),
    "qwen3_moe, fused": ("qwen3_moe", False),
    "mixtral as of transformers 4": ("mixtral", True),
    "mixtral as of transformers 5": ("mixtral", False),
    "gpt_oss": ("gpt_oss", True),
    "gpt_oss, MXFP4": ("gpt_oss", True),
}


@pytest.mark.slow
def test_no_layout_takes_more_memory_than_a_few_matrices(tmp_path: Path) -> None:
    """The whole is 100 MB; a matrix is read as 1 MB of float32, and the one before it may still be there.

    MXFP4 is decoded with gate and up of an expert together, 2 MB of float32 beside their bytes as indices.
    """
    for at, (model_type, original) in enumerate(LAYOUTS.values()):
        write_large(tmp_path / str(at), model_type, original=original)
    pack_experts(tmp_path / str(len(LAYOUTS) - 1))
    told = [str(tmp_path / str(at)) for at in range(len(LAYOUTS))]
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_layouts; test_layouts.child()"
    done = subprocess.run([sys.executable, "-c", code, *told], capture_output=True, text=True, check=True)
    found: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    for name, taken in zip(LAYOUTS, found, strict=True):
        assert taken["total"] > 100e6, name
        assert taken["read"] <= 8 * MATRIX, (name, taken)
        assert taken["opened"] <= taken["total"] / 2, (name, taken)


def child() -> None:
    """What the memory test runs in a process of its own; the first trace pays for imports and is not counted."""
    torch.set_num_threads(1)
    folders: list[Any] = sys.argv[1:]
    read_all(folders[-1])
    sys.stdout.write("\n" + json.dumps([read_all(folder) for folder in folders]) + "\n")
