"""The families that llama.cpp computes, a row each: its name, what it must be told, what it stores otherwise.

A row also holds what llama.cpp's code takes for granted, so that a config that differs is refused instead of computed
wrongly. All of it is of llama.cpp of October 2026.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aqtx.checkpoint.exports import gguf_numbers as tell
from aqtx.checkpoint.exports.gguf_numbers import Numbers
from aqtx.checkpoint.exports.gguf_rules import (
    CLAMPED_EXPERTS,
    DELTA,
    FUSED_DELTA,
    GRANITE,
    LATENT,
    OFFSET_GAINS,
    PAIRED,
    Rules,
)
from aqtx.models.rotary import Rope


@dataclass(frozen=True, kw_only=True)
class Family:
    """A row.

    Fields:
        arch: llama.cpp's name.
        numbers: the keys of a parsed config.
        rules: parameters that are stored otherwise.
        assumed: values of config.json that llama.cpp has built in; a missing key is None.
        ropes: the rotary variants.
        outer_scales: matrices of which it reads NVFP4's outer scale.
        limits: sentences about a parsed config that it cannot be told.
        notes: sentences about what it computes a little otherwise.
    """

    arch: str
    numbers: Callable[[Any], Numbers]
    rules: Rules = field(default_factory=dict)
    assumed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    outer_scales: str = r"self_attn\.[qkvo]_proj$|^lm_head$"
    limits: Callable[[Any], list[str]] = lambda parsed: []
    notes: Callable[[Any], list[str]] = lambda parsed: []


def _dense(parsed: Any) -> Numbers:
    return tell.shell(parsed.decoder, parsed.intermediate_size)


def _sparse(parsed: Any) -> Numbers:
    return _dense(parsed) | tell.experts(parsed.num_experts, parsed.experts_per_token)


def _small_experts(parsed: Any) -> Numbers:
    return _dense(parsed) | tell.experts(parsed.num_experts, parsed.experts_per_token, parsed.expert_size)


def _shared_expert(parsed: Any) -> Numbers:
    return _dense(parsed) | tell.experts(
        parsed.num_experts, parsed.experts_per_token, parsed.expert_size, parsed.shared_size
    )


def _delta(parsed: Any) -> Numbers:
    moe = parsed.moe
    counts = tell.experts(moe.num_experts, moe.experts_per_token, moe.expert_size, moe.shared_size)
    return tell.shell(parsed.decoder, moe.expert_size) | counts | tell.delta(parsed.delta, parsed.linear_layers)


def _sections(parsed: Any) -> Numbers:
    """Qwen3.5's rotated dimensions by time, height and width, which are one and the same for text."""
    return _delta(parsed) | {"rope_dimension_sections": [11, 11, 10, 0]}


def _deepseek(parsed: Any) -> Numbers:
    counts = tell.experts(parsed.num_experts, parsed.experts_per_token, parsed.expert_size)
    dense = min(parsed.sparse_layers, default=parsed.decoder.num_layers)
    shared = {"leading_dense_block_count": dense, "expert_shared_count": parsed.num_shared_experts}
    return _dense(parsed) | counts | shared | {"expert_weights_scale": 1.0}


def _latent(parsed: Any) -> Numbers:
    return _routed(parsed) | tell.latent(parsed.latent, parsed.decoder)


def _routed(parsed: Any) -> Numbers:
    counts = tell.routed(parsed.routing, parsed.expert_size, parsed.num_shared_experts, parsed.num_dense_layers)
    return _dense(parsed) | counts


def _gpt_oss(parsed: Any) -> Numbers:
    counts = tell.experts(parsed.num_experts, parsed.experts_per_token, parsed.expert_size)
    return tell.shell(parsed.decoder, parsed.expert_size) | counts | tell.windows(parsed.decoder)


def _gemma3(parsed: Any) -> Numbers:
    return _dense(parsed) | tell.windows(parsed.decoder)


def _granite(parsed: Any) -> Numbers:
    decoder = parsed.decoder
    counts = tell.experts(parsed.num_experts, parsed.experts_per_token)
    return (
        tell.shell(decoder, parsed.expert_size)
        | counts
        | {
            "attention_scale": decoder.softmax_scale,
            "embedding_scale": decoder.embedding_multiplier,
            "residual_scale": parsed.residual_multiplier,
            "logit_scale": decoder.logits_divisor,
        }
    )


def _ernie(parsed: Any) -> Numbers:
    shared = parsed.num_shared_experts * parsed.expert_size
    counts = tell.experts(parsed.num_experts, parsed.experts_per_token, parsed.expert_size, shared)
    first, step = _moe_layers(parsed)
    layers = {"leading_dense_block_count": first, "interleave_moe_layer_step": step}
    return _dense(parsed) | counts | layers | {"expert_shared_count": parsed.num_shared_experts}


def _moe_layers(parsed: Any) -> tuple[int, int]:
    """The first layer with experts, and every so-manieth has them."""
    found = sorted(parsed.sparse_layers) or [parsed.decoder.num_layers]
    return found[0], found[1] - found[0] if len(found) > 1 else found[0] + 1


_WITH_MLP = Family.outer_scales + r"|\.mlp\.(gate|up|down)_proj$"
_WITH_SHARED = Family.outer_scales + r"|shared_expert\.(gate|up|down)_proj$"
NONE: tuple[Any, ...] = (None, False)
_DIVISORS = ("default", "linear", "yarn", "llama3")  # where rotary frequencies can be divided one by one
_EVERY_LAYER = {"decoder_sparse_step": (None, 1), "mlp_only_layers": (None, [])}
_NO_WINDOW = {"use_sliding_window": NONE}
_NO_BIAS = {"attention_bias": NONE}


def _equal_heads(parsed: Any) -> list[str]:
    unequal = parsed.decoder.num_kv_heads != parsed.decoder.num_heads
    return ["has as many key heads as query heads"] if unequal else []


def _smollm3_limits(parsed: Any) -> list[str]:
    told = all(turned == ((layer + 1) % 4 != 0) for layer, turned in enumerate(parsed.decoder.rotated))
    return [] if told else ["has rotary positions in all but every fourth layer"]


def _delta_limits(parsed: Any) -> list[str]:
    told = [] if tell.period(parsed.linear_layers) is not None else ["wants attention in every so-manieth layer"]
    if parsed.delta.key_size != parsed.delta.value_size:
        told.append("wants heads of linear attention with keys as wide as values")
    return told


def _latent_limits(parsed: Any) -> list[str]:
    told, rope, routing = [], parsed.decoder.rope, parsed.routing
    if rope.kind == "yarn" and (rope.attention_factor != 1 or not rope.mscale_all_dim):
        told.append("wants YaRN's mscale and mscale_all_dim alike")
    if routing.score == "softmax" and routing.num_groups > 1:
        told.append("counts a group of experts by its two best, DeepSeek-V2 by its best")
    if routing.num_groups > 1 and routing.num_experts // routing.num_groups < 2:
        told.append("wants groups of two experts or more")
    if parsed.num_shared_experts < 1:
        told.append("wants a shared expert")
    if parsed.latent.query_rank is not None and parsed.decoder.num_layers in (26, 27):
        told.append("takes a model of 26 or 27 layers for one whose queries have no latent")
    return told


def _window_limits(parsed: Any) -> list[str]:
    windows = [window is not None for window in parsed.decoder.windows]
    return [] if tell.period(windows) is not None else ["wants full attention in every so-manieth layer"]


def _gpt_oss_limits(parsed: Any) -> list[str]:
    alike = all(window is None for window in parsed.decoder.windows)
    return ["wants a layer with a sliding window"] if alike else _window_limits(parsed)


def _gemma_limits(parsed: Any) -> list[str]:
    told, decoder = _window_limits(parsed), parsed.decoder
    size = decoder.hidden_size // decoder.num_heads if decoder.num_layers == 62 else decoder.head_size
    if abs(decoder.softmax_scale - size**-0.5) > 1e-6:
        told.append(f"has query_pre_attn_scalar {size} built in for {decoder.num_layers} layers of this size")
    if decoder.window_rope.kind != "default":
        told.append("has plain rotary positions in layers with a window")
    return told


def _ernie_limits(parsed: Any) -> list[str]:
    first, step = _moe_layers(parsed)
    every = {layer for layer in range(parsed.decoder.num_layers) if layer >= first and (layer + 1) % step == 0}
    return [] if every == parsed.sparse_layers else ["has experts up to the last layer"]


def _untruncated(parsed: Any) -> list[str]:
    rope: Rope = parsed.decoder.rope
    if rope.kind != "yarn" or rope.truncate:
        return []
    return ["llama.cpp takes the bounds of YaRN's ramp to whole dimensions, so that far positions differ a little"]


FAMILIES: dict[str, Family] = {
    "llama": Family(arch="llama", numbers=_dense, rules=PAIRED, ropes=_DIVISORS, outer_scales=_WITH_MLP),
    "mistral": Family(arch="llama", numbers=_dense, rules=PAIRED, ropes=_DIVISORS, outer_scales=_WITH_MLP),
    "mixtral": Family(arch="llama", numbers=_sparse, rules=PAIRED, ropes=_DIVISORS),
    "qwen2": Family(arch="qwen2", numbers=_dense, assumed=_NO_WINDOW),
    "qwen3": Family(arch="qwen3", numbers=_dense, assumed=_NO_WINDOW | _NO_BIAS, outer_scales=_WITH_MLP),
    "smollm3": Family(arch="smollm3", numbers=_dense, rules=PAIRED, assumed=_NO_WINDOW, limits=_smollm3_limits),
    "olmoe": Family(
        arch="olmoe",
        numbers=_sparse,
        assumed={"norm_topk_prob": NONE, "clip_qkv": (None,)} | _NO_BIAS,
        limits=_equal_heads,
    ),
    "qwen2_moe": Family(
        arch="qwen2moe", numbers=_shared_expert, assumed={"norm_topk_prob": NONE} | _EVERY_LAYER | _NO_WINDOW
    ),
    "qwen3_moe": Family(
        arch="qwen3moe",
        numbers=_small_experts,
        assumed={"norm_topk_prob": (True,)} | _EVERY_LAYER | _NO_WINDOW | _NO_BIAS,
    ),
    "qwen3_next": Family(
        arch="qwen3next",
        numbers=_delta,
        rules=FUSED_DELTA | OFFSET_GAINS,
        outer_scales=_WITH_SHARED,
        assumed={"norm_topk_prob": (None, True)} | _EVERY_LAYER | _NO_BIAS,
        limits=_delta_limits,
    ),
    "qwen3_5_moe_text": Family(
        arch="qwen35moe",
        numbers=_sections,
        rules=DELTA | OFFSET_GAINS,
        outer_scales=_WITH_SHARED + r"|linear_attn\.(in|out)_proj",
        assumed=_NO_BIAS,
        limits=_delta_limits,
    ),
    "deepseek": Family(
        arch="deepseek",
        numbers=_deepseek,
        rules=PAIRED,
        assumed={"norm_topk_prob": NONE, "moe_layer_freq": (None, 1)},
    ),
    "deepseek_v2": Family(
        arch="deepseek2",
        numbers=_latent,
        rules=LATENT,
        assumed={"mlp_bias": NONE, "rms_norm_eps": (None, 1e-6)} | _NO_BIAS,
        ropes=("default", "yarn"),
        outer_scales=r"self_attn\.o_proj$",
        limits=_latent_limits,
    ),
    "deepseek_v3": Family(
        arch="deepseek2",
        numbers=_latent,
        rules=LATENT,
        assumed={"mlp_bias": NONE, "rms_norm_eps": (None, 1e-6), "rope_interleave": (None, True)} | _NO_BIAS,
        ropes=("default", "yarn"),
        outer_scales=r"self_attn\.o_proj$",
        limits=_latent_limits,
    ),
    "glm4_moe": Family(arch="glm4moe", numbers=_routed),
    "gpt_oss": Family(
        arch="gpt-oss",
        numbers=_gpt_oss,
        rules=CLAMPED_EXPERTS,
        assumed={
            "attention_bias": (None, True),
            "tie_word_embeddings": NONE,
            "swiglu_alpha": (None, 1.702),
            "swiglu_limit": (None, 7.0),
        },
        limits=_gpt_oss_limits,
        notes=_untruncated,
    ),
    "gemma3_text": Family(arch="gemma3", numbers=_gemma3, rules=OFFSET_GAINS, assumed=_NO_BIAS, limits=_gemma_limits),
    "granitemoe": Family(arch="granitemoe", numbers=_granite, rules=PAIRED | GRANITE, ropes=_DIVISORS),
    "ernie4_5_moe": Family(
        arch="ernie4_5-moe",
        numbers=_ernie,
        assumed={"use_bias": NONE, "moe_norm_min": (None, 1e-12)},
        limits=_ernie_limits,
    ),
}
