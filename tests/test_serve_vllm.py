"""Exports in real vLLM on a CPU, in an environment of its own that `AQTX_VLLM_PYTHON` names (see CONTRIBUTING)."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.text.tokens import evaluation, load_tokenizer
from tests.quantized_folders import quantized

PYTHON = os.environ.get("AQTX_VLLM_PYTHON")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "serve_vllm.py"
LAYERS = {"*.0.*.experts.*": "int4_g32", "*.2.*.experts.*": "int4_g64", "*.3.*.experts.*": "int4_g32"}
# formats, further keys of the plan, whether vLLM computes with unrounded inputs
CASES = {
    "experts_g32": ({"*.experts.*": "int4_g32"}, {}, False),  # its only CPU kernel for experts rounds inputs to 8 bits
    "experts_g64": ({"*.experts.*": "int4_g64"}, {}, False),
    "layers_differ": (LAYERS, {}, False),
    "dense_int4": ({"*.self_attn.*": "int4_g32"}, {}, True),
    "w8a8_experts": ({"*.experts.*": "int8_row"}, {"aq": "int8_row"}, False),
    "w8a8": ({"*.self_attn.*": "int8_row"}, {"aq": "int8_row"}, False),
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PYTHON is None, reason="AQTX_VLLM_PYTHON names no environment")]


@pytest.mark.parametrize("name", CASES)
def test_vllm_scores_text_as_ours(name: str, tmp_path: Path) -> None:
    """Within .01 nats on 2,000 tokens, and the same greedy text where inputs are not rounded.

    Its kernel takes bf16 only, whose sums it adds in another order: a token of its text may be beside our likeliest by
    four units in the last place of bf16, 2^-7 of the logit each.
    """
    formats, keys, is_exact = CASES[name]
    folder = quantized("tinymoe", tmp_path / "q", formats, **keys)
    made = export(folder, "compressed-tensors", tmp_path / "out")
    assert "vllm" in made.clients
    documents = evaluation("builtin", load_tokenizer(folder), max_tokens=12_000)
    prompts = [document.ids[:500].tolist() for document in documents if len(document.ids) >= 500][:4]
    job = {"prompts": prompts, "start": prompts[0][:100], "new_tokens": 32}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [
        str(PYTHON),
        str(SCRIPT),
        str(tmp_path / "out"),
        str(tmp_path / "job.json"),
        str(tmp_path / "result.json"),
    ]
    settings = {"VLLM_CPU_INT4_W4A8": str(int(not is_exact)), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    program = aqtx.load(folder)
    module, losses = program.module(), []
    for ids in prompts:
        with torch.no_grad():
            rows = module(torch.tensor([ids]))[0].float().log_softmax(-1)
        losses.append(-rows[:-1].gather(1, torch.tensor(ids[1:])[:, None]))
    assert result["tokens"] == 4 * 499
    assert abs(result["loss"] - float(torch.cat(losses).mean())) < 0.01
    if is_exact:
        with torch.no_grad():
            rows = module(torch.tensor([job["start"] + result["greedy"]]))[0, len(job["start"]) - 1 : -1].float()
        best = rows.amax(-1)
        behind = best - rows.gather(1, torch.tensor(result["greedy"])[:, None])[:, 0]
        assert (behind <= 4 * 2**-7 * best.abs()).all() and (behind == 0).sum() >= 28
