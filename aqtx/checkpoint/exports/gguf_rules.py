"""Parameters that llama.cpp wants otherwise than checkpoints have them, by what they are; any other stays as it is.

A rule makes the parts of a parameter from config.json and its name. Llama's rotary op pairs neighbouring rows of q and
k. DeltaNet's projections come with q, k, v of all heads one behind the other, and the value heads of Qwen3.5 in turn by
key head, as an op that repeats keys wants them. Latent attention reads keys through a turned matrix a head.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aqtx.checkpoint.exports.gguf_parts import DECAY, PLUS_ONE, Part, Pick, split_name
from aqtx.models.config import Fields
from aqtx.models.gated_delta import DeltaConfig
from aqtx.models.latent_attention import LatentConfig

Config = Mapping[str, Any]
Rule = Callable[[Config, str], list[Part]]
Rules = dict[str, Rule]  # expression that finds a parameter -> its rule; the first that does


def parts_of(rules: Rules, config: Config, parameter: str) -> list[Part]:
    """The tensors that hold a parameter."""
    for pattern, rule in (rules | EVERYWHERE).items():
        if re.search(pattern, parameter):
            return rule(config, parameter)
    return [Part(*split_name(parameter))]


def _renamed(pattern: str, asked: str, suffix: str = ".weight") -> Rule:
    """Under another name."""

    def rule(config: Config, name: str) -> list[Part]:
        return [Part(re.sub(pattern, asked, split_name(name)[0]), suffix)]

    return rule


def _neighbours(heads: int, rows: int) -> NDArray[np.intp]:
    """Rows of q or k in the order in which halves of a head become pairs."""
    half = rows // heads // 2
    return np.arange(rows).reshape(heads, 2, half).swapaxes(1, 2).reshape(-1)


def _rotary_pairs(config: Config, name: str) -> list[Part]:
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    mine = heads if ".q_proj." in name else int(config.get("num_key_value_heads") or heads)
    return [Part(*split_name(name), rows=Pick(_neighbours(mine, mine * size), mine * size))]


def _plus_one(config: Config, name: str) -> list[Part]:
    return [Part(*split_name(name), change=PLUS_ONE)]


def _delta(config: Config, *, fused: bool) -> DeltaConfig:
    return DeltaConfig.read(Fields(config), fused=fused)


def _decay(config: Config, name: str) -> list[Part]:
    return [Part(name, "", change=DECAY)]


def _queries_to_gates(config: Config, name: str) -> list[Part]:
    """Qwen3-Next's projection, which has q, k, v and z of each key head together, as one of q, k, v and one of z."""
    delta = _delta(config, fused=True)
    each = delta.value_heads // delta.key_heads * delta.value_size
    sizes = (delta.key_size, delta.key_size, each, each)
    rows = np.arange(delta.key_heads * sum(sizes)).reshape(delta.key_heads, -1)
    q, k, v, z = (part.reshape(-1) for part in np.split(rows, np.cumsum(sizes)[:-1], axis=1))
    base = name.removesuffix("qkvz.weight")
    mixed = Pick(np.concatenate((q, k, v)), rows.size)
    return [Part(f"{base}qkv", rows=mixed), Part(f"{base}z", rows=Pick(z, rows.size))]


def _in_turn(config: Config) -> Pick:
    """Value heads, which lie together by their key head, in turn by it."""
    delta = _delta(config, fused=False)
    order = np.arange(delta.value_heads).reshape(delta.key_heads, -1).T.reshape(-1)
    return Pick(order, delta.value_heads)


def _values_in_turn(config: Config, name: str) -> list[Part]:
    asked, suffix = split_name(name)
    if name.endswith(".A_log"):
        return [Part(name, "", rows=_in_turn(config), change=DECAY)]
    if name.endswith(".dt_bias"):
        return [Part(name.replace("dt_bias", "dt_proj"), ".bias", rows=_in_turn(config))]
    return [Part(asked, suffix, rows=_in_turn(config))]


def _channels_in_turn(config: Config, name: str) -> list[Part]:
    """q and k as they are, and value heads in turn."""
    delta, first = _delta(config, fused=False), 2 * _delta(config, fused=False).keys
    rows = np.concatenate((np.arange(first), first + _in_turn(config).where(delta.values)))
    return [Part(*split_name(name), rows=Pick(rows, len(rows)))]


def _columns_in_turn(config: Config, name: str) -> list[Part]:
    return [Part(*split_name(name), columns=_in_turn(config))]


def _keys_and_values(config: Config, name: str) -> list[Part]:
    """The expansion of the latent: a turned matrix of keys and one of values for each head."""
    latent, heads = LatentConfig.read(Fields(config), interleaved=True), int(config["num_attention_heads"])
    rows = np.arange(heads * (latent.plain_size + latent.value_size)).reshape(heads, -1)
    keys, values = rows[:, : latent.plain_size].reshape(-1), rows[:, latent.plain_size :].reshape(-1)
    base = name.removesuffix("kv_b_proj.weight")
    return [
        Part(f"{base}k_b_proj", rows=Pick(keys, rows.size), heads=heads, turned=True),
        Part(f"{base}v_b_proj", rows=Pick(values, rows.size), heads=heads),
    ]


def _gate_and_up_bias(config: Config, name: str) -> list[Part]:
    """gpt-oss keeps the biases of gate and up in turn."""
    size, base = 2 * int(config["intermediate_size"]), name.removesuffix("gate_up_proj_bias")
    return [
        Part(f"{base}{projection}", ".bias", columns=Pick(np.arange(first, size, 2), size))
        for first, projection in enumerate(("gate_proj", "up_proj"))
    ]


EVERYWHERE: Rules = {
    r"\.e_score_correction_bias$": _renamed("_bias$", "", ".bias"),
}
PAIRED: Rules = {r"self_attn\.[qk]_proj\.": _rotary_pairs}
OFFSET_GAINS: Rules = {r"(?<!linear_attn\.)[a-z_]*norm\.weight$": _plus_one}
CLAMPED_EXPERTS: Rules = {
    r"\.gate_up_proj_bias$": _gate_and_up_bias,
    r"\.down_proj_bias$": _renamed("_bias$", "", ".bias"),
}
LATENT: Rules = {r"\.kv_b_proj\.weight$": _keys_and_values}
GRANITE: Rules = {
    r"\.experts\.gate_proj$": _renamed("gate_proj$", "w1"),
    r"\.experts\.up_proj$": _renamed("up_proj$", "w3"),
    r"\.experts\.down_proj$": _renamed("down_proj$", "w2"),
}
FUSED_DELTA: Rules = {
    r"\.in_proj_qkvz\.": _queries_to_gates,
    r"\.A_log$": _decay,
    r"\.dt_bias$": _renamed("dt_bias$", "dt_proj", ".bias"),
}
DELTA: Rules = {
    r"\.in_proj_qkv\.|\.conv1d\.": _channels_in_turn,
    r"\.in_proj_[zab]\.|\.dt_bias$|\.A_log$": _values_in_turn,
    r"linear_attn\.out_proj\.": _columns_in_turn,
}
