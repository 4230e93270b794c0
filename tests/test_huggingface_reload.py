"""Our checkpoints in transformers: loaded by its own `from_pretrained`, and exported as plain weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_huggingface_trace import foreign
from transformers import AutoModelForCausalLM

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.formats import quantize
from aqtx.passes.fold_norms import FoldNorms
from aqtx.passes.insert_hadamard import InsertHadamard
from aqtx.program.edits import Hadamard, QuantizeActivation
from tests.marks import slow
from tests.model_cases import oracle, token_ids

FORMATS = ("mxfp4", "int4_g32_asym", "mxfp6", "nvfp4")


def quantized(folder: Path, source: Path, *, passes: tuple[Any, ...] = (), dtype: torch.dtype | None = None) -> Path:
    """A checkpoint in which most sites are rounded, to four formats in turn, some not."""
    program = aqtx.trace(source, dtype)
    aqtx.run(program, list(passes))
    sites = [site for site in program.sites() if site.category != "router"]
    for place, site in enumerate(sites):
        if place % 5:
            program.codes[site.name] = quantize(program.read(site), FORMATS[place % 4])
    program.emitted = True
    return aqtx.save(program, folder)


def reloaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a checkpoint of ours."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize(
    "name",
    ["olmoe", "gpt-oss", *slow("mixtral", "llama", "qwen3", "llama-tied", "qwen2-moe", "granitemoe", "qwen3-5-moe")],
)
def test_transformers_computes_what_aqtx_computes(name: str, tmp_path: Path) -> None:
    oracle(name).save_pretrained(tmp_path / "source")
    folder = quantized(tmp_path / "quantized", tmp_path / "source")
    model, ids = reloaded(folder), token_ids(2, 11)
    with torch.no_grad():
        found = aqtx.load(folder).module()(ids)
        assert (model(ids).logits - found).abs().max() <= 2e-6 * max(1.0, float(found.abs().max()))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)(ids).logits
        assert (model(ids).logits - plain).abs().max() > 1e-3, "nothing was quantized"


@pytest.mark.parametrize("name", ["olmoe", *slow("llama-tied")])
def test_rotated_models_reload_with_their_rotations(name: str, tmp_path: Path) -> None:
    oracle(name).save_pretrained(tmp_path / "source")
    passes = (FoldNorms(), InsertHadamard(before=("mlp_down", "residual"), block=16))
    folder = quantized(tmp_path / "quantized", tmp_path / "source", passes=passes)
    program, ids = aqtx.load(folder), token_ids(2, 11)
    assert any(isinstance(edit, Hadamard) for edit in program.edits)
    with torch.no_grad():
        assert (reloaded(folder)(ids).logits - program.module()(ids)).abs().max() <= 2e-6


def test_quantized_activations_reload(tmp_path: Path) -> None:
    oracle("olmoe").save_pretrained(tmp_path / "source")
    program = aqtx.trace(tmp_path / "source")
    for weight, sites in program.sites_by_weight().items():
        names = ["mxfp8" if site.expert is None or site.expert % 2 else "int8" for site in sites]
        if sites[0].category not in ("router", "lm_head"):
            program.edit(QuantizeActivation(weight=weight, formats=tuple(names)))
            for site in sites:
                program.codes[site.name] = quantize(program.read(site), "mxfp6")
    program.emitted = True
    folder, ids = aqtx.save(program, tmp_path / "quantized"), token_ids(2, 11)
    with torch.no_grad():
        assert (reloaded(folder)(ids).logits - aqtx.load(folder).module()(ids)).abs().max() <= 2e-6


@pytest.mark.parametrize("name", [*slow("qwen2-moe", "qwen3")])
def test_bfloat16_gives_the_same_greedy_tokens(name: str, tmp_path: Path) -> None:
    from aqtx.program.generate import Generator

    oracle(name).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    folder = quantized(tmp_path / "quantized", tmp_path / "source")
    prompt = token_ids(1, 6)
    theirs = reloaded(folder, torch.bfloat16).generate(prompt, max_new_tokens=8, do_sample=False)[0, 6:]
    assert Generator(aqtx.load(folder)).continue_greedily(prompt.tolist(), max_new_tokens=8) == [theirs.tolist()]


@pytest.mark.parametrize("model_type", ["gpt_oss", *slow("gemma3_text")])
def test_models_that_only_transformers_knows_reload_and_export(model_type: str, tmp_path: Path) -> None:
    foreign(model_type).save_pretrained(tmp_path / "source")
    folder = quantized(tmp_path / "quantized", tmp_path / "source")
    export(folder, "dequantized", tmp_path / "plain", dtype=torch.float32)
    ids = token_ids(2, 11)
    with torch.no_grad():
        expected = aqtx.load(folder).module()(ids)
        assert (reloaded(folder)(ids).logits - expected).abs().max() <= 2e-6
        assert (reloaded(tmp_path / "plain")(ids).logits - expected).abs().max() <= 2e-6


@pytest.mark.parametrize("name", ["llama-tied", *slow("mixtral")])
def test_exported_folders_are_plain_and_compute_the_same(name: str, tmp_path: Path) -> None:
    """In float32 codes and scales are exact; undoing a rotation rounds each weight once more, to its last place.

    Each of the model's 22 products then differs by half a unit of its last place, 6e-8 relative, with random
    signs: 3e-7 of logits up to 4, and the largest of 2,000 logits is some four standard deviations out.
    """
    oracle(name).save_pretrained(tmp_path / "source")
    passes = (FoldNorms(), InsertHadamard(before=("mlp_down", "residual"), block=16))
    folder = quantized(tmp_path / "quantized", tmp_path / "source", passes=passes)
    export(folder, "dequantized", tmp_path / "plain", dtype=torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    ids = token_ids(2, 11)
    with torch.no_grad():
        expected = aqtx.load(folder).module()(ids)
        assert (reloaded(tmp_path / "plain")(ids).logits - expected).abs().max() <= 5e-6
    export(folder, "dequantized", tmp_path / "half")
    assert reloaded(tmp_path / "half", "auto").dtype == torch.bfloat16


@pytest.mark.parametrize("first", ["import aqtx, transformers", *slow("import transformers, aqtx")])
def test_importing_aqtx_is_enough_and_stays_light(first: str) -> None:
    code = f"{first}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print('aqtx' in m)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    light = "import sys, aqtx; print(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True).stdout == "False\n"
