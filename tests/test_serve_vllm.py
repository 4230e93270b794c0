"""Exports in real vLLM on a CPU, in an environment of its own that `AQTX_VLLM_PYTHON` names (see CONTRIBUTING)."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import aqtx
from aqtx.checkpoint.exports.run import export
from aqtx.checkpoint.locate import shipped
from aqtx.text.tokens import evaluation, load_tokenizer
from tests.model_cases import oracle
from tests.quantized_folders import config_of, quantized, with_tokenizer

PYTHON = os.environ.get("AQTX_VLLM_PYTHON")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "serve_vllm.py"
LAYERS = {"*.0.*.experts.*": "int4_g32", "*.2.*.experts.*": "int4_g64", "*.3.*.experts.*": "int4_g32"}
# formats, further keys of the plan, whether vLLM computes with unrounded inputs
CASES = {
    "experts_g32": ({"*.experts.*": "int4_g32"}, {}, False),  # its only CPU kernel for experts rounds inputs to 8 bits
    "experts_g64": ({"*.experts.*": "int4_g64"}, {}, False),
    "experts_rows_of_one_group": ({"*.experts.*": "int4"}, {}, False),  # of 128, which is a row of the third matrix
    "layers_differ": (LAYERS, {}, False),
    "dense_int4": ({"*.self_attn.*": "int4_g32"}, {}, True),
    "w8a8_experts": ({"*.experts.*": "int8_row"}, {"aq": "int8_row"}, False),
    "w8a8": ({"*.self_attn.*": "int8_row"}, {"aq": "int8_row"}, False),
}

NO_KERNEL = torch.backends.cpu.get_cpu_capability() != "AVX512"
WHY = "vLLM 0.32 has kernels for INT4 on processors with AVX-512 only"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PYTHON is None, reason="AQTX_VLLM_PYTHON names no environment")]


def prompts_of(folder: Path) -> list[list[int]]:
    """Four of 500 tokens, the beginnings of documents."""
    documents = evaluation("builtin", load_tokenizer(folder), max_tokens=12_000)
    return [document.ids[:500].tolist() for document in documents if len(document.ids) >= 500][:4]


def serve(folder: Path, prompts: list[list[int]], *, is_exact: bool = False) -> dict[str, Any]:
    """What vLLM makes of an exported folder; its kernel for INT4 rounds inputs unless `is_exact`."""
    job, result = folder.parent / "job.json", folder.parent / "result.json"
    job.write_text(json.dumps({"prompts": prompts, "start": prompts[0][:100], "new_tokens": 32}))
    settings = {"VLLM_CPU_INT4_W4A8": str(int(not is_exact)), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [str(PYTHON), str(SCRIPT), str(folder), str(job), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr[-2000:]
    told: dict[str, Any] = json.loads(result.read_text())
    return told


def log_probabilities(module: torch.nn.Module, prompts: list[list[int]]) -> torch.Tensor:
    """Of each token but the first of a prompt, in nats."""
    rows = []
    for ids in prompts:
        with torch.no_grad():
            told = module(torch.tensor([ids]))[0, :-1].float().log_softmax(-1)
        rows.append(told.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return torch.cat(rows)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(NO_KERNEL and not name.startswith("w8a8"), reason=WHY))
        for name in CASES
    ],
)
def test_vllm_scores_text_as_ours(name: str, tmp_path: Path) -> None:
    """Within .01 nats on 2,000 tokens, and the same greedy text where inputs are not rounded.

    Its kernel takes bf16 only, whose sums it adds in another order: a token of its text may be beside our likeliest by
    four units in the last place of bf16, 2^-7 of the logit each.
    """
    formats, keys, is_exact = CASES[name]
    folder = quantized("tinymoe", tmp_path / "q", formats, **keys)
    assert "vllm" in export(folder, "compressed-tensors", tmp_path / "out").clients
    prompts = prompts_of(folder)
    result = serve(tmp_path / "out", prompts, is_exact=is_exact)
    module = aqtx.load(folder).module()
    assert result["tokens"] == 4 * 499
    assert abs(result["loss"] + float(log_probabilities(module, prompts).mean())) < 0.01
    if is_exact:
        start, greedy = prompts[0][:100], result["greedy"]
        with torch.no_grad():
            rows = module(torch.tensor([start + greedy]))[0, len(start) - 1 : -1].float()
        best = rows.amax(-1)
        behind = best - rows.gather(1, torch.tensor(greedy)[:, None])[:, 0]
        assert (behind <= 4 * 2**-7 * best.abs()).all() and (behind == 0).sum() >= 28


@pytest.mark.skipif(NO_KERNEL, reason=WHY)
def test_vllm_finds_the_experts_of_mixtral(tmp_path: Path) -> None:
    """Their names on disk are `w1`, `w3` and `w2`. A random model, so token by token: its loss says little.

    The differences of rounded inputs are small beside what the experts do to each token.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    vocabulary = config_of(shipped()["tinymoe"])["vocab_size"]
    model = oracle("mixtral", **sizes, vocab_size=vocabulary, initializer_range=0.05)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    with_tokenizer(tmp_path / "source")
    folder = quantized(tmp_path / "source", tmp_path / "q", {"*.experts.*": "int4_g32"})
    assert "vllm" in export(folder, "compressed-tensors", tmp_path / "out").clients
    prompts = prompts_of(folder)
    theirs = torch.tensor(serve(tmp_path / "out", prompts)["scores"]).flatten()
    ours = log_probabilities(aqtx.load(folder).module(), prompts)
    silent = aqtx.trace(tmp_path / "source").module()
    with torch.no_grad():
        for name, value in silent.named_parameters():
            value.mul_(0 if name.endswith("w2") else 1)
    without = log_probabilities(silent, prompts)
    assert (theirs - ours).abs().mean() < 0.1 * (ours - without).abs().mean()
