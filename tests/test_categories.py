"""The role of a matrix by its name, also where an architecture names or fuses its projections in its own way."""

import pytest

from aqtx.program.roles import category_of, select

ROLES = {
    "model.layers.0.self_attn.q_proj": "attn_q",
    "model.layers.0.self_attn.qkv_proj": "attn_qkv",  # Phi-3
    "gpt_neox.layers.0.attention.query_key_value": "attn_qkv",
    "gpt_neox.layers.0.attention.dense": "attn_o",
    "gpt_neox.layers.0.mlp.dense_h_to_4h": "other",
    "transformer.h.0.self_attention.query_key_value": "attn_qkv",  # Falcon
    "transformer.h.0.self_attention.dense": "attn_o",
    "model.layers.0.self_attn.kv_a_proj_with_mqa": "attn_other",  # DeepSeek V2 and V3
    "model.decoder.layers.0.self_attn.out_proj": "attn_o",  # OPT
    "model.layers.0.block_sparse_moe.router.layer": "router",  # Granite
    "model.layers.0.block_sparse_moe.gate": "router",
    "model.layers.0.mlp.router": "router",
    "model.layers.0.mlp.experts.3.gate_proj": "mlp_gate",
    "model.layers.0.mlp.shared_experts.gate_proj": "shared_expert",
    "model.layers.0.mlp.shared_expert_gate": "shared_expert_gate",
    "embed_out": "lm_head",
}


@pytest.mark.parametrize(("name", "role"), ROLES.items())
def test_the_role_of_a_name(name, role):
    assert category_of(name) == role


def test_to_keep_attention_is_to_keep_all_of_it():
    kept = {name for name in ROLES if "attn" in ROLES[name]}
    assert set(select(ROLES, ["attention"], "keep")) == kept
