"""Exporting our architectures: canonical nodes, blocks without symbols, any batch and length."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from test_models_deepseek import CONFIG as DEEPSEEK
from torch import fx, nn

from aqtx.models import build
from aqtx.program.trace import export_entry
from tests.marks import slow, slow_but
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


@pytest.mark.parametrize("name", slow_but(("olmoe", "deepseek-v3", "gpt-oss"), [*TRACED, "deepseek"]))
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


@pytest.mark.parametrize("name", ["mistral-window", *slow("olmoe", "qwen2-moe")])
def test_step_graph_serves_prefill_and_decoding(name: str) -> None:
    model, graph = traced(name, "step")
    ids, start = token_ids(1, 8), torch.zeros(1, dtype=torch.long)
    theirs, ours = model.make_cache(1, 10), model.make_cache(1, 10)
    with torch.no_grad():
        for span in (torch.arange(7), torch.arange(7, 8)):
            assert torch.equal(graph(ids[:, span], span, start, ours), model(ids[:, span], span, start, theirs))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("name", "entry"), [("gpt-oss", "step"), *slow(("qwen2-moe", "score"), ("qwen2-moe", "step"))])
def test_blocks_do_no_arithmetic_with_sizes(name: str, entry: str) -> None:
    """A size read inside a block would have to be passed from block to block when they are split."""
    with torch.device("meta"):
        graph = export_entry(build(case_config(name)).eval().to("meta"), entry)
    symbolic = [node for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)]
    inside = [str(node) for node in symbolic if re.search(r"layers\.\d", str(node.meta.get("nn_module_stack")))]
    assert inside == []
    assert [node.target for node in symbolic] == [torch.ops.aten.sym_size.int]
