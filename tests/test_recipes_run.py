"""Every shipped recipe runs from end to end, on little text."""

import math

import pytest
import torch

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.runs.recipe import shipped_recipes
from tests.marks import slow_but

SMALL = {
    "calibration__num_sequences": 10,
    "calibration__sequence_length": 64,
    "evaluate__max_tokens": 600,
    "report": False,
}
# name -> overrides, and the bits per planned weight that its formats have
RUNS = {
    "alphaquant_classic": ({"evaluate__batch_size": 2}, None),
    "int4": ({}, 4.125),
    "llamacpp_mixed": ({}, None),
    "mixed_alpha": ({}, None),
    "mxfp4_rotated": ({}, 4.25),
    "mxfp8_activations": ({}, 4.25),
    "vllm_int4": ({}, 4.5),
    "vllm_mixed": ({}, None),
    "router_only": ({"passes__3__finetune_router__epochs": 1}, 3.125),
}
QUICK = ("int4", "vllm_int4")  # the others' methods, formats and exports have default tests of their own
# recipes for another program -> the form that it loads, and its name
EXPORTS = {
    "llamacpp_mixed": ("gguf", "llama.cpp"),
    "vllm_int4": ("compressed-tensors", "vllm"),
    "vllm_mixed": ("compressed-tensors", "vllm"),
}


def test_every_recipe_is_run_by_some_test():
    assert sorted(shipped_recipes()) == sorted([*RUNS, "quickstart", "study"])  # these have test files of their own


@pytest.mark.parametrize("name", slow_but(QUICK, RUNS))
def test_a_shipped_recipe_runs_and_reloads(name, tmp_path):
    overrides, bits = RUNS[name]
    report = aqtx.apply(name, output=str(tmp_path / name), **{**SMALL, **overrides})
    data = report.data
    for counts in (data["weights"], data["sites"]):
        assert counts["quantized"] + counts["kept"] + counts["refused"] == counts["total"]
    assert data["weights"]["quantized"] > data["weights"]["total"] / 2
    assert bits is None or data["average_bits"] == pytest.approx(bits, abs=1e-3)
    assert data["bytes"]["after"] < 0.6 * data["bytes"]["before"]
    assert all(row["max_difference"] is None or row["max_difference"] <= row["tolerance"] for row in data["passes"])
    assert math.isfinite(data["perplexity"]["after"]["value"])
    with torch.no_grad():
        logits = aqtx.load(report.directory).module()(torch.tensor([[5, 6, 7]]))
    assert logits.isfinite().all()
    if name in EXPORTS:
        to, client = EXPORTS[name]
        made = export(report.directory, to, tmp_path / "exported")
        assert client in made.clients and made.checked is not None and not made.checked.allowed
