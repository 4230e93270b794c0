"""Exporting our architectures: canonical nodes, blocks without symbols, any batch and length, true sizes."""

import json
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from test_models_deepseek import CONFIG as DEEPSEEK
from torch import fx, nn

from aqtx.models import build
from aqtx.program.trace import export_entry
from tests.model_cases import CASES, SMALL, randomize, token_ids

TRACED = (
    "olmoe",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "deepseek-v3",
    "glm4-moe",
    "gpt-oss",
    "gemma3",
    "mistral-window",
    "llama-dynamic",
)
# Published config.json of families, and gigabytes of bf16 weights.
TRUE_SIZES: dict[str, tuple[dict[str, Any], float]] = {
    "OLMoE-1B-7B": (
        {
            "model_type": "olmoe",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
        13.8,
    ),
    "Mixtral-8x7B": (
        {
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        93.4,
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        },
        61.1,
    ),
    "DeepSeek-V3": (
        {
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "routed_scaling_factor": 2.5,
        },
        1342.1,
    ),
}


def case_config(name: str) -> dict[str, Any]:
    """The config.json of a case."""
    if name == "deepseek":
        return DEEPSEEK
    model_type, own = CASES[name]
    return SMALL | {"model_type": model_type} | own


def traced(name: str, entry: str) -> tuple[nn.Module, fx.GraphModule]:
    """A model with weights and its exported entry over the same weights."""
    config = case_config(name)
    model = build(config).eval()
    randomize(model)
    with torch.device("meta"):
        blank = build(config).eval().to("meta")
    graph = export_entry(blank, entry)
    for node in graph.graph.nodes:
        node.kwargs = {
            key: torch.device("cpu") if isinstance(value, torch.device) else value for key, value in node.kwargs.items()
        }
    graph.recompile()
    graph.load_state_dict(model.state_dict(), assign=True)
    for buffer, value in model.named_buffers():
        graph.get_submodule(buffer.rpartition(".")[0]).register_buffer(buffer.rpartition(".")[2], value)
    return model, graph


@pytest.mark.parametrize("name", [*TRACED, "deepseek"])
def test_score_graph_is_canonical_and_equal_for_any_batch_and_length(name: str) -> None:
    model, graph = traced(name, "score")
    counts = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    modules = Counter(type(module).__name__ for module in model.modules())
    stacks = sum(parameter.dim() == 3 for parameter in model.parameters())
    assert counts["aten.linear.default"] == modules["Linear"] + modules["TopKRouter"]
    assert counts["aten.rms_norm.default"] == modules["RMSNorm"] + modules["OffsetRMSNorm"]
    assert counts["aqtx.grouped_linear.default"] == stacks
    with torch.no_grad():
        for batch, length in ((1, 1), (1, 9), (4, 1), (3, 17)):
            ids = token_ids(batch, length)
            assert torch.equal(graph(ids), model(ids)), (batch, length)


@pytest.mark.parametrize("name", ["olmoe", "qwen2-moe", "mistral-window"])
def test_step_graph_serves_prefill_and_decoding(name: str) -> None:
    model, graph = traced(name, "step")
    ids, start = token_ids(1, 8), torch.zeros(1, dtype=torch.long)
    theirs, ours = model.make_cache(1, 10), model.make_cache(1, 10)
    with torch.no_grad():
        for span in (torch.arange(7), torch.arange(7, 8)):
            assert torch.equal(graph(ids[:, span], span, start, ours), model(ids[:, span], span, start, theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("name", "entry"), [("qwen2-moe", "score"), ("qwen2-moe", "step"), ("gpt-oss", "step")])
def test_blocks_do_no_arithmetic_with_sizes(name: str, entry: str) -> None:
    """A size read inside a block would have to be passed from block to block when they are split."""
    with torch.device("meta"):
        graph = export_entry(build(case_config(name)).eval().to("meta"), entry)
    symbolic = [node for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)]
    inside = [str(node) for node in symbolic if re.search(r"layers\.\d", str(node.meta.get("nn_module_stack")))]
    assert inside == []
    assert [node.target for node in symbolic] == [torch.ops.aten.sym_size.int]


MEASURE = """
import json, sys, torch
from aqtx.machine.memory import peak_bytes
from aqtx.models import build
from aqtx.program.trace import export_entry
import aqtx.formats.grouped_linear
with torch.device("meta"):
    model = build(json.loads(sys.argv[1])).eval().to("meta").to(torch.bfloat16)
export_entry(model, "score")
print(json.dumps({"peak_bytes": peak_bytes(), "elements": sum(p.numel() for p in model.parameters())}))
"""


@pytest.mark.parametrize(
    "name", ["OLMoE-1B-7B", *(pytest.param(name, marks=pytest.mark.slow) for name in list(TRUE_SIZES)[1:])]
)
def test_true_sizes_trace_without_their_weights(name: str) -> None:
    """The whole process, PyTorch included, stays under 1 GB while 14 to 1342 GB of weights are on meta."""
    config, gigabytes = TRUE_SIZES[name]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(config)], capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["elements"] * 2 / 1e9 == pytest.approx(gigabytes, abs=0.1)
    assert measured["peak_bytes"] < 1_000_000_000
