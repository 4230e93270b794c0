"""What llama.cpp must be told of an architecture: a row per family, keys by `gguf`, and names of tensors.

A row holds llama.cpp's name, whether its rotary op wants the rows of q and k in another order, and what its code takes
for granted, so that a config that differs is refused instead of computed wrongly.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import MODEL_ARCH_NAMES, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map

from aqtx.checkpoint.exports.gguf_tokenizer import add_tokenizer
from aqtx.errors import InputError, malformed
from aqtx.models.rotary import Rope

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_OWN_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True, kw_only=True)
class Family:
    """`permuted`: q and k pair neighbouring rows. `assumed`: config values that llama.cpp's code has built in."""

    arch: str
    permuted: bool = False
    assumed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    equal_heads: bool = False  # as many heads of keys as of queries
    theta: float = 10000.0


_NO_BIAS: tuple[Any, ...] = (None, False)
_PLAIN_TOP_K: tuple[Any, ...] = (None, False)
FAMILIES: dict[str, Family] = {
    "llama": Family(arch="llama", permuted=True),
    "mistral": Family(arch="llama", permuted=True),
    "mixtral": Family(arch="llama", permuted=True, theta=1e6),
    "qwen2": Family(arch="qwen2", assumed={"use_sliding_window": _NO_BIAS}),
    "qwen3": Family(arch="qwen3", assumed={"use_sliding_window": _NO_BIAS, "attention_bias": _NO_BIAS}),
    "smollm3": Family(
        arch="smollm3",
        permuted=True,
        theta=2e6,
        assumed={"no_rope_layer_interval": (None, 4), "use_sliding_window": _NO_BIAS},
    ),
    "olmoe": Family(
        arch="olmoe",
        equal_heads=True,
        assumed={"norm_topk_prob": _PLAIN_TOP_K, "clip_qkv": (None,), "attention_bias": _NO_BIAS},
    ),
    "qwen2_moe": Family(
        arch="qwen2moe",
        assumed={
            "norm_topk_prob": _PLAIN_TOP_K,
            "decoder_sparse_step": (None, 1),
            "mlp_only_layers": (None, []),
            "use_sliding_window": _NO_BIAS,
        },
    ),
    "qwen3_moe": Family(
        arch="qwen3moe",
        assumed={
            "norm_topk_prob": (True,),
            "decoder_sparse_step": (None, 1),
            "mlp_only_layers": (None, []),
            "use_sliding_window": _NO_BIAS,
            "attention_bias": _NO_BIAS,
        },
    ),
    "deepseek": Family(
        arch="deepseek", permuted=True, assumed={"norm_topk_prob": _PLAIN_TOP_K, "moe_layer_freq": (None, 1)}
    ),
}


def family_of(config: Mapping[str, Any], template: Path | None) -> Family:
    """The row of a model; with a template its architecture, permuted where llama.cpp's code for it is Llama's."""
    if template is None:
        return FAMILIES[config["model_type"]]
    arch = str(GGUFReader(template).fields["general.architecture"].contents())
    return Family(arch=arch, permuted=any(row.permuted for row in FAMILIES.values() if row.arch == arch))


_OF_TEMPLATES = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size"}


def template_problems(config: Mapping[str, Any], template: Path) -> list[str]:
    """Why metadata of another file do not go with a model, in sentences.

    Some architectures are stored otherwise than their checkpoints (Gemma's norms plus one), so only those of the rows
    are taken, whatever the model calls itself.
    """
    if not template.is_file():
        return [f"the template {template} is no file"]
    with malformed(f"the template {template} is no GGUF file"):
        fields = GGUFReader(template).fields
        arch = str(fields["general.architecture"].contents())
    known = sorted({row.arch for row in FAMILIES.values()})
    if arch not in known:
        told = ", ".join(known)
        return [f"the template's architecture {arch} may be stored otherwise than its checkpoints; known are {told}"]
    found = {key: fields.get(f"{arch}.{key}") for key in _OF_TEMPLATES}
    counts = {key: field.contents() for key, field in found.items() if field is not None}
    problems = [
        f"the template has {key} {value}, and config.json has {_OF_TEMPLATES[key]} {config.get(_OF_TEMPLATES[key])}"
        for key, value in counts.items()
        if value != config.get(_OF_TEMPLATES[key])
    ]
    return [*problems, *(config_problems(config) if config.get("model_type") in FAMILIES else [])]


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Why llama.cpp would not compute this model, in sentences."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        return [
            f"no metadata for model_type {kind!r} (known: {known}): give a GGUF file of the same model by --template"
        ]
    problems = [
        f"config.json: llama.cpp has {key} {' or '.join(map(repr, values))} built in for {kind}, not {config[key]!r}"
        for key, values in FAMILIES[kind].assumed.items()
        if key in config and config[key] not in values
    ]
    if FAMILIES[kind].equal_heads and config.get("num_key_value_heads") not in (None, config["num_attention_heads"]):
        problems.append(f"config.json: llama.cpp's {kind} has as many key heads as query heads")
    rope = Rope.kind_of(config)
    if rope not in ("default", "linear", "llama3", "yarn"):
        problems.append(f"config.json: llama.cpp has no rotary variant {rope!r}")
    return problems


def names_of(arch: str, num_layers: int) -> TensorNameMap:
    """Names on disk, without the expert's number, to names in GGUF."""
    found = [key for key, name in MODEL_ARCH_NAMES.items() if name == arch]
    if not found:
        raise InputError(f"the architecture {arch!r} of the template is unknown to gguf {_version()}")
    return get_tensor_name_map(found[0], num_layers)


def _version() -> str:
    from importlib.metadata import version

    return version("gguf")


def add_metadata(writer: GGUFWriter, config: Mapping[str, Any], folder: Path, name: str) -> None:
    """The architecture's keys and the tokenizer, from config.json and the tokenizer's files."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or hidden // heads
    writer.add_name(name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    _add_rope(writer, config)
    _add_experts(writer, config)
    _add_kind(writer)
    add_tokenizer(writer, folder, config["vocab_size"])
    writer.add_string("aqtx.config", json.dumps(dict(config)))


def _add_kind(writer: GGUFWriter) -> None:
    writer.add_file_type(LlamaFileType.GUESSED)
    writer.add_quantization_version(2)


def _add_rope(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    rope = Rope.from_dict(config, FAMILIES[config["model_type"]].theta)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_positions)


def _add_experts(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Counts and widths of experts, where there are any."""
    count = next((config[key] for key in _EXPERTS if config.get(key)), None)
    if count is None:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if config["model_type"] == "deepseek":
        writer.add_leading_dense_block_count(config.get("first_k_dense_replace") or 0)
        writer.add_expert_shared_count(config.get("n_shared_experts") or 0)
        writer.add_expert_weights_scale(1.0)


def copy_metadata(writer: GGUFWriter, template: Path, config: Mapping[str, Any], folder: Path | None) -> None:
    """All keys of an existing file but those that tell its types."""
    for found in GGUFReader(template).fields.values():
        if found.name.startswith("GGUF.") or found.name.startswith("split.") or found.name in _OWN_KEYS:
            continue
        kind, inner = found.types[0], found.types[-1]
        writer.add_key_value(
            found.name, found.contents(), kind, sub_type=inner if kind is GGUFValueType.ARRAY else None
        )
    _add_kind(writer)
    writer.add_string("aqtx.config", json.dumps(dict(config)))
    own = None if folder is None else folder / "tokenizer.json"
    if own is not None and own.is_file() and "tokenizer.huggingface.json" not in writer.kv_data[0]:
        writer.add_string("tokenizer.huggingface.json", own.read_text(encoding="utf-8"))
