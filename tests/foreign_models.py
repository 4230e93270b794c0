"""transformers' own models with random weights, of families that are traced rather than implemented."""

from typing import Any

import torch
from torch import nn

from tests.model_cases import SMALL, randomize

MOE = {"num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK_V3 = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
# model_type -> settings beside SMALL, matrices of one layer, norms of the whole model that are one op each
FOREIGN: dict[str, tuple[dict[str, Any], int, int]] = {
    "gemma": ({"head_dim": 16}, 7, 5),
    "gemma3_text": ({"head_dim": 16}, 7, 13),
    "phi": ({}, 6, 0),
    "gpt_neox": ({"rotary_pct": 0.5}, 4, 0),
    "qwen3_moe": (MOE, 4 + 1 + 24, 9),
    "gpt_oss": (MOE | {"head_dim": 16}, 4 + 1 + 24, 5),
    "granitemoe": (MOE, 4 + 1 + 24, 5),
}


LATENT = {
    "deepseek_v2": DEEPSEEK_V3 | {"topk_method": "greedy", "n_shared_experts": 1},
    "deepseek_v3": DEEPSEEK_V3,
    "glm4_moe_lite": DEEPSEEK_V3 | {"rope_interleave": True, "mlp_layer_types": ["dense", "sparse"], "n_group": 1},
}


def foreign(model_type: str, **settings: Any) -> nn.Module:
    """transformers' model with two layers and random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = LATENT.get(model_type) or FOREIGN.get(model_type, ({}, 0, 0))[0]
    config = AutoConfig.for_model(model_type, **(SMALL | {"num_hidden_layers": 2} | own | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    return model
