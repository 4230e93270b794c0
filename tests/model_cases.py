"""Small random models of transformers' own classes, and the way from their folders into ours."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from aqtx.checkpoint.huggingface.open import fused_source
from aqtx.checkpoint.reader import CheckpointReader
from aqtx.models import build, load_config
from aqtx.models.decoder import CausalLM
from aqtx.program.names import NamesTable

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 3}
QWEN_MOE = MOE | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 80}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

ROUTED = {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LATENT = ROUTED | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
DELTA = QWEN_MOE | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
}
GEMMA = {"head_dim": 24, "tie_word_embeddings": True, "query_pre_attn_scalar": 16}
DELTA_LAYERS = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
OSS = {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16, "sliding_window": 5}
OSS_ROPE = {"rope_parameters": YARN | {"rope_theta": 150000.0, "truncate": False}}
GRANITE = {"num_local_experts": 8, "num_experts_per_tok": 3, "attention_multiplier": 0.2, "embedding_multiplier": 6.0}
GRANITE |= {"residual_multiplier": 0.37, "logits_scaling": 1.5}
ERNIE = {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 24}
GLM_MOE = ROUTED | {"head_dim": 16, "n_group": 1, "topk_group": 1}

# name -> (model_type, settings beside SMALL)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", MOE),
    "olmoe-clip-norm": ("olmoe", MOE | {"clip_qkv": 0.3, "norm_topk_prob": True, "num_key_value_heads": 4}),
    "olmoe-bias": ("olmoe", MOE | {"attention_bias": True}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "sliding_window": 5, "head_dim": 8}),
    "qwen2-moe": ("qwen2_moe", QWEN_MOE),
    "qwen2-moe-sparse-step": ("qwen2_moe", QWEN_MOE | {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    "qwen2-moe-dense-layers": ("qwen2_moe", QWEN_MOE | {"mlp_only_layers": [0], "qkv_bias": False}),
    "qwen2-moe-window": (
        "qwen2_moe",
        QWEN_MOE | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3-moe": ("qwen3_moe", QWEN_MOE | {"head_dim": 24}),
    "qwen3-moe-dense-layers": (
        "qwen3_moe",
        QWEN_MOE
        | {"mlp_only_layers": [0], "norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3-moe-window": (
        "qwen3_moe",
        QWEN_MOE | {"use_sliding_window": True, "sliding_window": 5, "decoder_sparse_step": 2},
    ),
    "qwen3-next": (
        "qwen3_next",
        DELTA | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 16},
    ),
    "qwen3-next-dense-layers": (
        "qwen3_next",
        DELTA
        | {"full_attention_interval": 2, "mlp_only_layers": [1], "norm_topk_prob": False, "attention_bias": True}
        | {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3, "head_dim": 24}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "qwen3-5-moe": ("qwen3_5_moe_text", DELTA | DELTA_LAYERS | {"head_dim": 16}),
    "qwen3-5-moe-bias": (
        "qwen3_5_moe_text",
        DELTA
        | {"attention_bias": True, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 3, "head_dim": 24}
        | {"layer_types": ["full_attention", "linear_attention", "full_attention"], "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "gpt-oss": ("gpt_oss", OSS | OSS_ROPE),
    "gpt-oss-full": (
        "gpt_oss",
        OSS
        | {"attention_bias": False, "swiglu_alpha": 1.3, "swiglu_limit": 0.3, "tie_word_embeddings": True}
        | {"layer_types": ["full_attention"] * 3, "head_dim": 12, "num_key_value_heads": 4},
    ),
    "granitemoe": ("granitemoe", GRANITE),
    "granitemoe-bias": ("granitemoe", GRANITE | {"attention_bias": True, "tie_word_embeddings": True}),
    "deepseek-v2": ("deepseek_v2", LATENT | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5}),
    "deepseek-v2-groups": (
        "deepseek_v2",
        LATENT | {"q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek-v2-yarn": ("deepseek_v2", LATENT | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}),
    "deepseek-v3": ("deepseek_v3", LATENT | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}),
    "deepseek-v3-plain": (
        "deepseek_v3",
        LATENT
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False}
        | {"attention_bias": True, "first_k_dense_replace": 0},
    ),
    "deepseek-v3-yarn": (
        "deepseek_v3",
        LATENT | {"n_group": 2, "topk_group": 1, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "ernie-moe": ("ernie4_5_moe", ERNIE),
    "ernie-moe-steps": (
        "ernie4_5_moe",
        ERNIE
        | {"moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_layer_interval": 2, "use_bias": True}
        | {"moe_num_shared_experts": 0, "tie_word_embeddings": True, "moe_norm_min": 0.5},
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma3-untied": (
        "gemma3_text",
        GEMMA
        | {"sliding_window": 6, "attention_bias": True, "tie_word_embeddings": False, "query_pre_attn_scalar": 9}
        | {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5}}}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "glm4-moe": ("glm4_moe", GLM_MOE | {"use_qk_norm": True, "first_k_dense_replace": 1}),
    "glm4-moe-groups": (
        "glm4_moe",
        GLM_MOE
        | {"n_group": 2, "topk_group": 1, "attention_bias": True, "norm_topk_prob": False, "first_k_dense_replace": 0}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    ),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e4}}),
    "llama-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}, "max_position_embeddings": 8},
    ),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False, "beta_fast": 16.0}},
    ),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-tied-bias": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
}
MOE_CASES = ("olmoe", "mixtral", "qwen2-moe")


def oracle(name: str, **settings: Any) -> nn.Module:
    """transformers' model of a case, with random weights, norms and biases that matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, own = CASES[name]
    config = AutoConfig.for_model(model_type, **(SMALL | own | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    """Weights of a spread that lets every part of the architecture reach the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = "norm" in name and parameter.dim() == 1
            parameter.copy_(parameter.mean().round() + 0.2 * noise if gain else 0.1 * noise)  # Gemma stores gain - 1
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def ours(folder: Path) -> CausalLM:
    """Our model of a checkpoint folder, in float32, after the checks that every run makes."""
    config = load_config(folder)
    model, reader = build(config).eval(), CheckpointReader(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    laid_out = fused_source(reader, config, shapes)
    if laid_out is not None:
        laid_out.check(shapes, folder)
    else:
        reader.check(shapes, tied=model.state_dict().keys() - shapes.keys())
    table = NamesTable(shapes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = [reader.get(key) for key in table.to_disk[name]] if laid_out is None else [laid_out.parameter(name)]
            parameter.copy_(parts[0] if parts[0].shape == parameter.shape else torch.stack(parts))
    return model


def token_ids(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random tokens of the small vocabulary."""
    return torch.randint(0, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
