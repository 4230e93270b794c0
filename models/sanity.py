"""Values of a config.json with which no model of any architecture computes anything, told before one is built."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

_POSITIVE = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "clip_qkv",
    "attention_multiplier",
    "logits_scaling",
)
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ROPES = ("rope_scaling", "rope_parameters")
# What nobody has trained, and what no machine would come to the end of: endings of keys and the most that they may be.
_LIMITS = {
    ("_layers", "n_layer"): 1000,
    ("_experts",): 1 << 16,
    ("_heads", "n_head"): 1 << 16,
    ("_size", "_dim", "_rank", "n_embd"): 1 << 24,
}
_NO_SIZE = ("window", "chunk", "batch")  # "unlimited" may be written as a large number there
_LARGEST = 2**63
_DEEPEST = 50


def nonsense(config: Mapping[str, Any]) -> list[str]:
    """A sentence for every key whose value makes no sense; keys that are missing or null are left to their defaults."""
    problems = [*_deep(config, ""), *_limits(config), *_rope(config)]
    if not isinstance(kind := config.get("model_type", ""), str):
        problems.append(f"model_type must be text, not {kind!r:.80}")
    for key in _POSITIVE:
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping) and not _is_positive(value):
            problems.append(f"{key} must be a number above 0, not {value!r:.80}")
    for key in _COUNTS:
        value = config.get(key)
        if value is not None and (type(value) is not int or value < 1):
            problems.append(f"{key} must be a positive whole number, not {value!r:.80}")
    chosen = config.get("num_experts_per_tok")
    for key in _EXPERTS:
        experts = config.get(key)
        if type(experts) is int and type(chosen) is int and chosen > experts > 0:
            problems.append(f"num_experts_per_tok is {chosen}, and {key} only {experts}")
    return problems


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _deep(value: Any, where: str, depth: int = 0) -> Iterator[str]:
    """Numbers that no machine word holds, and nesting that nobody writes."""
    if depth > _DEEPEST:
        yield f"{where[:80]} is nested more than {_DEEPEST} deep"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _deep(item, f"{where}.{key}" if where else str(key), depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _deep(item, f"{where}.{index}", depth + 1)
    elif type(value) is int and not -_LARGEST <= value < _LARGEST:
        yield f"{where} is {value!r:.40}, which 64 bits do not hold"


def _limits(config: Mapping[str, Any]) -> Iterator[str]:
    """Sizes that no model has: they would be allocated, or counted up to."""
    for key, value in config.items():
        for endings, most in _LIMITS.items():
            sized = key.endswith(endings) and not any(word in key for word in _NO_SIZE)
            if sized and type(value) is int and most < value < _LARGEST:
                yield f"{key} is {value}, more than the {most:,} that any model has"


def _rope(config: Mapping[str, Any]) -> Iterator[str]:
    """The sections on rotary positions: mappings of numbers, or of one such mapping for each type of layer."""
    for name in _ROPES:
        section = config.get(name)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            yield f"{name} must be an object, not {section!r:.80}"
            continue
        inner = [(f"{name}.{key}", item) for key, item in section.items() if isinstance(item, Mapping)]
        for where, entries in [(name, section), *inner]:
            yield from _rope_entries(where, entries)


def _rope_entries(where: str, section: Mapping[str, Any]) -> Iterator[str]:
    for key, value in section.items():
        place = f"{where}.{key}"
        if key in ("rope_type", "type") and not isinstance(value, str):
            yield f"{place} must be text, not {value!r:.80}"
        elif key in ("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"):
            if value is not None and not _is_positive(value):
                yield f"{place} must be a number above 0, not {value!r:.80}"
        elif type(value) is float and not math.isfinite(value):
            yield f"{place} must be a finite number, not {value}"
