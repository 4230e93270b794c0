"""Values of a config.json with which no model of any architecture computes anything, told before one is built."""

import math
from collections.abc import Mapping
from typing import Any

_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "rope_theta")
_COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def nonsense(config: Mapping[str, Any]) -> list[str]:
    """A sentence for every key whose value makes no sense; keys that are missing or null are left to their defaults."""
    problems = []
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
