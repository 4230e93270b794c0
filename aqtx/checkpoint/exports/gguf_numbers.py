"""What a GGUF file tells of an architecture, from the parsed config of its model: `gguf`'s name of a key -> its value.

Each function tells of one mechanism; a row of `gguf_families` puts them together.
"""

from typing import Any

from gguf import ExpertGatingFuncType, RopeScalingType

from aqtx.models.config import DecoderConfig
from aqtx.models.gated_delta import DeltaConfig
from aqtx.models.latent_attention import LatentConfig
from aqtx.models.rotary import Rope
from aqtx.models.top_k_router import Routing

Numbers = dict[str, Any]


def shell(decoder: DecoderConfig, width: int) -> Numbers:
    """What all decoders have; `width` is that of the feed-forward."""
    return {
        "vocab_size": decoder.vocab_size,
        "context_length": decoder.rope.max_positions,
        "embedding_length": decoder.hidden_size,
        "block_count": decoder.num_layers,
        "feed_forward_length": width,
        "head_count": decoder.num_heads,
        "head_count_kv": decoder.num_kv_heads,
        "layer_norm_rms_eps": decoder.norm_eps,
        "key_length": decoder.head_size,
        "value_length": decoder.head_size,
        "rope_dimension_count": decoder.rotary_size,
    } | positions(decoder.rope)


def positions(rope: Rope) -> Numbers:
    """The rotary variant. llama.cpp multiplies YaRN's cos and sin by 0.1 ln(factor) + 1 and by what it is told."""
    told: Numbers = {"rope_freq_base": rope.theta}
    if rope.kind == "linear":
        told |= {"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": rope.factor}
    if rope.kind == "yarn":
        told |= {
            "rope_scaling_type": RopeScalingType.YARN,
            "rope_scaling_factor": rope.factor,
            "rope_scaling_orig_ctx_len": rope.original_max_positions,
            "rope_scaling_yarn_beta_fast": rope.beta_fast,
            "rope_scaling_yarn_beta_slow": rope.beta_slow,
        }
        if (share := rope.attention_factor / rope.usual_attention) != 1:
            told |= {"rope_scaling_attn_factors": share}
    return told


def experts(count: int, used: int, width: int | None = None, shared_width: int | None = None) -> Numbers:
    """Counts and widths of experts, where there are any."""
    told = {"expert_count": count, "expert_used_count": used}
    told |= {} if width is None else {"expert_feed_forward_length": width}
    return told if shared_width is None else told | {"expert_shared_feed_forward_length": shared_width}


def routed(routing: Routing, width: int, num_shared: int, num_dense: int) -> Numbers:
    """DeepSeek's experts: scores, groups, scale, shared experts, dense layers before the others."""
    sigmoid = routing.score == "sigmoid"
    told = experts(routing.num_experts, routing.experts_per_token, width) | {
        "expert_shared_count": num_shared,
        "leading_dense_block_count": num_dense,
        "expert_weights_scale": routing.scale,
        "expert_weights_norm": routing.normalize,
        "expert_gating_func": ExpertGatingFuncType.SIGMOID if sigmoid else ExpertGatingFuncType.SOFTMAX,
    }
    if routing.num_groups > 1:
        told |= {"expert_group_count": routing.num_groups, "expert_group_used_count": routing.kept_groups}
    return told


def delta(config: DeltaConfig, linear_layers: tuple[bool, ...]) -> Numbers:
    """Gated DeltaNet layers, and which layers have attention instead."""
    return {
        "ssm_conv_kernel": config.kernel,
        "ssm_state_size": config.key_size,
        "ssm_group_count": config.key_heads,
        "ssm_time_step_rank": config.value_heads,
        "ssm_inner_size": config.values,
        "full_attention_interval": period(linear_layers) or len(linear_layers) + 1,
    }


def latent(config: LatentConfig, decoder: DecoderConfig) -> Numbers:
    """Latent attention as one key head of all queries: its rank, and the sizes of heads behind it."""
    told: Numbers = {
        "head_count_kv": 1,
        "kv_lora_rank": config.latent_rank,
        "q_lora_rank": config.query_rank or 0,
        "key_length": config.latent_rank + config.rotary_size,
        "value_length": config.latent_rank,
        "key_length_mla": config.key_size,
        "value_length_mla": config.value_size,
        "rope_dimension_count": config.rotary_size,
    }
    if decoder.rope.kind == "yarn":  # the scale of scores follows from it, and cos and sin have none
        told |= {"rope_scaling_yarn_log_mul": 0.1 * decoder.rope.mscale_all_dim, "rope_scaling_attn_factors": 1.0}
    return told


def windows(decoder: DecoderConfig) -> Numbers:
    """The width of sliding windows, and in which layers they are."""
    width = next((window for window in decoder.windows if window is not None), None)
    if width is None:
        return {}
    told: Numbers = {
        "sliding_window": width,
        "sliding_window_pattern": period([w is not None for w in decoder.windows]),
    }
    if decoder.window_rope is not None:
        told["rope_freq_base_swa"] = decoder.window_rope.theta
    return told


def period(marked: tuple[bool, ...] | list[bool]) -> int | None:
    """Every so-manieth layer is the unmarked one; 0 where all are marked, None where no such number is."""
    if all(marked):
        return 0
    every = marked.index(False) + 1
    return every if all(mark == ((i + 1) % every != 0) for i, mark in enumerate(marked)) else None
