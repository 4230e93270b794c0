"""What is collected of transformers' models is what their own modules see: hooks, for every family, twice."""

from typing import Any

import pytest
import torch
from test_huggingface_trace import foreign
from torch import nn

from aqtx.blockwise.block_runner import Runner, Want, waves_of
from aqtx.blockwise.block_stream import Stream
from aqtx.blockwise.input_moments import Moments
from aqtx.checkpoint.huggingface.experts import is_fused_experts
from aqtx.checkpoint.huggingface.open import trace_foreign
from aqtx.checkpoint.huggingface.skeleton import canonical_tensors
from aqtx.program.blocks import split_blocks
from aqtx.program.program import Program
from aqtx.program.weights import ModuleSource
from tests.marks import slow_but
from tests.model_cases import token_ids

FAMILIES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gpt_oss", "qwen3_moe", "gpt_neox", "gemma3_text", "phi")


def hooked(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """By weight: sum of x x^T over what each linear reads, and each expert's gate and up, in float64."""
    seen: dict[str, torch.Tensor] = {}

    def linear(name: str) -> Any:
        def look(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            rows = arguments[0].flatten(0, -2).double()
            seen[f"{name}.weight"] = rows.mT @ rows

        return look

    def experts(name: str) -> Any:
        def look(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            rows, chosen = arguments[0].double(), arguments[1]
            every = [rows[(chosen == expert).any(-1)] for expert in range(module.num_experts)]
            seen[f"{name}.gate_proj"] = torch.stack([part.mT @ part for part in every])

        return look

    handles = [
        module.register_forward_pre_hook((linear if isinstance(module, nn.Linear) else experts)(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or is_fused_experts(module)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def collected(program: Program, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same from the graph, a block at a time, each wave for itself as GPTQ does; nothing is rounded."""
    runner = Runner(program, Stream(1, None), torch.device("cpu"))
    runner.start(ids, len(ids))
    found: dict[str, torch.Tensor] = {}
    for block in split_blocks(program.graph, program.weights.specs):
        sites = [site for site in program.sites() if site.node in block.nodes]
        weights = runner.load(block)
        for wave in waves_of(block, sites):
            for stage in wave:
                moments = Moments.empty(stage.experts, stage.num_inputs, torch.device("cpu"))
                runner.collect(block, weights, [Want(stage, moments)])
                for members in stage.sites.values():
                    found[members[0].weight] = moments.H.double() if stage.offsets else moments.H[0].double()
        runner.advance(block, weights)
    return found


@pytest.mark.parametrize("model_type", slow_but(("deepseek_v3", "gpt_oss", "phi"), FAMILIES))
def test_collected_inputs_are_those_of_the_modules(model_type: str) -> None:
    """Inputs differ by float32's rounding through two layers, 2e-6 at most (see the trace tests), of values near 1."""
    theirs, ids = foreign(model_type), token_ids(2, 19)
    expected = hooked(theirs, ids)
    program = trace_foreign(theirs.config.to_dict(), ModuleSource(canonical_tensors(theirs)), torch.float32)
    poison = [torch.full((size,), torch.nan) for size in (1 << 8, 1 << 12, 1 << 16)]  # freed: what is unwritten is NaN
    del poison
    for _ in range(2):
        found = collected(program, ids)
        assert expected.keys() <= found.keys(), sorted(expected.keys() - found.keys())
        for name in sorted(expected):
            assert found[name].shape == expected[name].shape
            assert (found[name] - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
