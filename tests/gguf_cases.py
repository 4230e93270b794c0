"""Small random models in settings that llama.cpp can compute: one a family, and what else their configs can say."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from aqtx.models import build
from aqtx.program.names import NamesTable
from tests.model_cases import LLAMA3, YARN, oracle, randomize
from tests.quantized_folders import with_tokenizer

SIZES = {"vocab_size": 3072, "bos_token_id": 0, "eos_token_id": 0}
SIZES |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 32}
TURNS = HEADS | {"layer_types": ["linear_attention", "full_attention"]}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}
TRUNCATED = {"rope_parameters": YARN | {"rope_theta": 150000.0}}
TIED = {"tie_word_embeddings": True}
LATE = {"first_k_dense_replace": 0, "norm_topk_prob": False, "routed_scaling_factor": 2.5}
NEXT = HEADS | {"layer_types": None, "full_attention_interval": 2}

# A case each, and the settings in which llama.cpp can compute it; the others of a family are slow.
CASE_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3-next", NEXT),
    "qwen3_5_moe_text": ("qwen3-5-moe", TURNS),
    "glm4_moe": ("glm4-moe", {}),
    "gpt_oss": ("gpt-oss", TRUNCATED | WINDOWS),
    "deepseek_v2": ("deepseek-v2", {}),
    "deepseek_v3": ("deepseek-v3", {}),
    "gemma3_text": ("gemma3", WINDOWS | {"query_pre_attn_scalar": 24}),
    "granitemoe": ("granitemoe", {}),
    "ernie4_5_moe": ("ernie-moe", {}),
}
SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next tied, one head of values": ("qwen3-next", NEXT | TIED | {"linear_num_value_heads": 2}),
    "qwen3_next yarn, kernel of 3": (
        "qwen3-next",
        NEXT | {"linear_conv_kernel_dim": 3, "rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    ),
    "qwen3_5 tied, four heads of values": ("qwen3-5-moe", TURNS | TIED | {"linear_num_value_heads": 8}),
    "qwen3_5 one head of values": ("qwen3-5-moe", TURNS | {"linear_num_value_heads": 2}),
    "glm4 groups, biases, no norms": ("glm4-moe-groups", {}),
    "glm4 tied, no dense layer": ("glm4-moe", TIED | LATE | {"n_shared_experts": 1}),
    "glm4 yarn": ("glm4-moe", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}),
    "gpt_oss windows": ("gpt-oss", PLAIN_ROPE | {"layer_types": ["sliding_attention"] * 2}),
    "deepseek_v2 no latent of queries": ("deepseek-v2", {"q_lora_rank": None}),
    "deepseek_v2 yarn": ("deepseek-v2-yarn", {}),
    "deepseek_v3 yarn": ("deepseek-v3-yarn", {}),
    "deepseek_v3 tied, no groups": ("deepseek-v3", TIED | LATE | {"n_group": 1, "topk_group": 1}),
    "deepseek_v3 dense": ("deepseek-v3", {"first_k_dense_replace": 2}),
    "gemma3 untied, linear": (
        "gemma3-untied",
        WINDOWS | {"attention_bias": False, "query_pre_attn_scalar": 24, "sliding_window": 6},
    ),
    "gemma3 full": ("gemma3", {"layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 24}),
    "granite tied, biases": ("granitemoe-bias", {}),
    "granite llama3": ("granitemoe", {"rope_parameters": LLAMA3}),
    "ernie tied, no shared experts": ("ernie-moe", TIED | {"moe_num_shared_experts": 0}),
    "ernie every other layer": ("ernie-moe", {"moe_layer_start_index": 1, "moe_layer_interval": 2}),
    "llama yarn, another scale": ("llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}),
    "qwen3 yarn, other bounds": ("qwen3", {"rope_parameters": YARN | {"beta_fast": 16.0, "attention_factor": 1.3}}),
    "smollm3 by its list": ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4}),
}
ALL = CASE_OF | SWITCHES


def save_own(config: dict[str, Any], folder: Path) -> None:
    """A random model of our own class, for which transformers has none, saved under the names on disk."""
    model = build(config)
    randomize(model)
    table = NamesTable({name: tuple(value.shape) for name, value in model.named_parameters()})
    tensors = {}
    for name, value in model.state_dict().items():
        keys = table.to_disk[name]
        parts = value if len(keys) > 1 else value[None]
        tensors |= {key: part.contiguous() for key, part in zip(keys, parts, strict=True)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with_tokenizer(folder)


def made(case: str, folder: Path, **settings: Any) -> nn.Module:
    """transformers' model of a case, saved with the shipped tokenizer."""
    name, own = ALL[case]
    model = oracle(name, **(SIZES | own | settings))
    model.save_pretrained(folder)
    with_tokenizer(folder)
    return model


def ids_of(count: int) -> list[int]:
    """Random tokens."""
    return torch.randint(1, 3072, (count,), generator=torch.Generator().manual_seed(0)).tolist()
