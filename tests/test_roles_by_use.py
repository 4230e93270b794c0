"""Roles by what matrices do in the graph, on families whose names tell nothing or lie."""

import re
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aqtx
from aqtx.checkpoint.huggingface.open import trace_foreign
from aqtx.models.layers import Experts, route
from aqtx.planning.options import choose
from aqtx.planning.settings import Settings
from tests.marks import slow, slow_but
from tests.model_cases import SMALL, oracle

MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 2}
LATENT = ("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj")
ATTENTION = {f"attn_{part}": {f"self_attn.{part}_proj"} for part in "qkvo"}
EXPERTS = {f"mlp_{part}": {f"mlp.experts.#.{part}_proj"} for part in ("gate", "up", "down")}
SHARED = {f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
DENSE = {f"dense_{part}": {f"mlp.{part}_proj"} for part in ("gate", "up", "down")}
HEAD = {"lm_head": {"lm_head"}}
# transformers' model_type -> settings, and names by category
FOREIGN: dict[str, tuple[dict[str, Any], dict[str, set[str]]]] = {
    "hunyuan_v1_moe": (
        {"head_dim": 16, "moe_topk": [2, 2], "num_shared_expert": [1, 1]},
        ATTENTION
        | EXPERTS
        | {"router": {"mlp.gate.wg"}, "shared_expert": {f"mlp.shared_mlp.{p}_proj" for p in ("gate", "up", "down")}},
    ),
    "afmoe": (
        {"head_dim": 16, "num_dense_layers": 1, "num_shared_experts": 1},
        ATTENTION
        | EXPERTS
        | DENSE
        | {"router": {"mlp.router.gate"}, "attn_gate": {"self_attn.gate_proj"}, "shared_expert": SHARED},
    ),
    "nemotron_h": (
        {"layers_block_type": ["mamba", "attention", "moe"], "num_hidden_layers": 3, "head_dim": 16}
        | {"ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8}
        | {"n_routed_experts": 8, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 32}
        | {"n_group": 1, "topk_group": 1},
        {f"attn_{part}": {f"mixer.{part}_proj"} for part in "qkvo"}
        | {"linear_attn_in": {"mixer.in_proj"}, "linear_attn_out": {"mixer.out_proj"}}
        | {"mlp_up": {"mixer.experts.#.up_proj"}, "mlp_down": {"mixer.experts.#.down_proj"}}
        | {"shared_expert": {f"mixer.shared_experts.{part}_proj" for part in ("up", "down")}},
    ),
}
OWN = {
    "deepseek-v3": EXPERTS
    | DENSE
    | {"attn_latent": set(LATENT), "attn_o": {"self_attn.o_proj"}, "router": {"mlp.gate"}, "shared_expert": SHARED},
    "qwen3-next": ATTENTION
    | EXPERTS
    | {"linear_attn_in": {"linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"}, "router": {"mlp.gate"}}
    | {"linear_attn_out": {"linear_attn.out_proj"}, "shared_expert_gate": {"mlp.shared_expert_gate"}}
    | {"shared_expert": {f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}},
    "gpt-oss": ATTENTION | EXPERTS | {"router": {"mlp.router"}},
    "granitemoe": ATTENTION
    | {"router": {"block_sparse_moe.router.layer"}}
    | {role: {name.replace("mlp.", "block_sparse_moe.") for name in names} for role, names in EXPERTS.items()},
    "llama": ATTENTION | {f"mlp_{part}": {f"mlp.{part}_proj"} for part in ("gate", "up", "down")},
}


def by_category(program: aqtx.Program) -> dict[str, set[str]]:
    """Names without layers and numbers of experts, by category."""
    found: dict[str, set[str]] = defaultdict(set)
    for site in program.sites():
        name = re.sub(r"experts\.\d+\.", "experts.#.", site.name)
        found[site.category].add(re.sub(r"^(model\.)?layers\.\d+\.", "", name))
    return dict(found)


@pytest.mark.parametrize("model_type", slow(*FOREIGN))
def test_roles_of_traced_families(model_type: str) -> None:
    from transformers import AutoConfig

    own, expected = FOREIGN[model_type]
    config = AutoConfig.for_model(model_type, **(SMALL | MOE | own)).to_dict()
    assert by_category(trace_foreign(config, None, torch.float32)) == expected | HEAD


@pytest.mark.parametrize("name", slow_but(("deepseek-v3", "llama"), OWN))
def test_roles_of_own_families(name: str) -> None:
    assert by_category(aqtx.trace(oracle(name))) == OWN[name] | HEAD


class Nameless(nn.Module):
    """A mixture of which no name tells anything: two linears make the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.a, self.b, self.c = (nn.Linear(16, size, bias=False) for size in (8, 4, 16))
        self.a2 = nn.Linear(8, 4, bias=False)
        self.experts = Experts(4, 16, 8)
        self.top = nn.Linear(16, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, S] -> logits [B, S, 32]."""
        x = self.table(ids)
        tokens = x.flatten(0, 1)
        weights, experts = route(self.a2(self.a(tokens).relu()) + 0 * self.b(tokens), 2, normalize=True)
        mixed = self.experts(tokens, weights, experts).view_as(x) + self.c(x)
        logits: Tensor = self.top(mixed)
        return logits


def test_a_router_is_what_chooses_experts() -> None:
    torch.manual_seed(0)
    program = aqtx.trace(Nameless())
    roles = {site.name: site.category for site in program.sites() if site.expert is None}
    assert roles == {"a": "router", "a2": "router", "b": "router", "c": "other", "top": "lm_head"}


def test_categories_are_what_keep_and_min_bits_select() -> None:
    program = aqtx.trace(oracle("deepseek-v3"))
    settings = Settings(
        method="uniform",
        candidates=("int4", "int8"),
        average_bits=6.0,
        keep=("router", "attn_latent", "dense_layers"),
        min_bits={"shared_expert": 8, "mlp_down": 8},
    )
    chosen = choose(program, settings)
    roles = {site.name: site.category for site in program.sites()}
    assert {roles[name] for name in chosen["keep"]} >= {"router", "attn_latent", *DENSE}
    assert {roles[name] for name in chosen["min_bits"]} == {"shared_expert", "mlp_down", "dense_down"}
