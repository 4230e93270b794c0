"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from one small latent.

The cache keeps the latent and one rotated key that all heads share, [B, 1, C, L] and [B, 1, C, R], and every call
expands them. Legend of shapes: see `layers.py`; L is the rank of the latent, P the part of a head without positions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aqtx.models.attention import Cache, CacheShape, Positions, pairs_to_halves, rotate_half
from aqtx.models.config import DecoderConfig, Fields
from aqtx.models.layers import RMSNorm

LATENT_NORM_EPS = 1e-6  # of the norms inside attention, whatever `rms_norm_eps` says


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Sizes of the parts of a head and the ranks of the latents."""

    query_rank: int | None  # None: queries come from one full matrix
    latent_rank: int
    plain_size: int
    rotary_size: int
    value_size: int
    bias: bool
    interleaved: bool  # rotated dimensions lie in pairs, not in halves

    @classmethod
    def read(cls, fields: Fields, *, interleaved: bool) -> "LatentConfig":
        """The fields as the DeepSeek family spells them."""
        return cls(
            query_rank=fields.integer("q_lora_rank") if fields.config.get("q_lora_rank") is not None else None,
            latent_rank=fields.integer("kv_lora_rank"),
            plain_size=fields.integer("qk_nope_head_dim"),
            rotary_size=fields.integer("qk_rope_head_dim"),
            value_size=fields.integer("v_head_dim"),
            bias=fields.flag("attention_bias", False),
            interleaved=interleaved,
        )

    @property
    def key_size(self) -> int:
        """Size of a head's queries and keys."""
        return self.plain_size + self.rotary_size


def softmax_scale(config: Mapping[str, Any], size: int) -> float:
    """size^-1/2, times YaRN's temperature squared where `mscale_all_dim` is given."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind, scale = rope.get("rope_type", rope.get("type", "default")), 1.0
    if kind != "default" and rope.get("mscale_all_dim") and rope["factor"] > 1:
        scale = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0
    return float(size**-0.5 * scale**2)


class LatentAttention(nn.Module):
    """Causal attention over keys and values that a latent of each token is expanded to."""

    def __init__(self, config: DecoderConfig, latent: LatentConfig) -> None:
        super().__init__()
        self.config, self.latent = config, latent
        hidden, heads = config.hidden_size, config.num_heads
        if latent.query_rank is None:
            self.q_proj = nn.Linear(hidden, heads * latent.key_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, latent.query_rank, bias=latent.bias)
            self.q_a_layernorm = RMSNorm(latent.query_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(latent.query_rank, heads * latent.key_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, latent.latent_rank + latent.rotary_size, bias=latent.bias)
        self.kv_a_layernorm = RMSNorm(latent.latent_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(latent.latent_rank, heads * (latent.plain_size + latent.value_size), bias=False)
        self.o_proj = nn.Linear(heads * latent.value_size, hidden, bias=latent.bias)

    @property
    def cache_shapes(self) -> list[CacheShape]:
        """The latent and the rotated key that all heads share."""
        return [CacheShape((1, None, self.latent.latent_rank)), CacheShape((1, None, self.latent.rotary_size))]

    def forward(self, x: Tensor, at: Positions, cache: Cache | None) -> Tensor:
        """x [B, S, H] -> [B, S, H]; a cache is written at `at.slots` and read whole."""
        sizes, heads = self.latent, self.config.num_heads
        q = self.q_proj(x) if sizes.query_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (heads, sizes.key_size)).transpose(1, 2)  # [B, Q, S, P + R]
        compressed = self.kv_a_proj_with_mqa(x).unsqueeze(1)  # [B, 1, S, L + R]
        latent = self.kv_a_layernorm(compressed[..., : sizes.latent_rank])
        shared = self._rotate(compressed[..., sizes.latent_rank :], at)  # [B, 1, S, R]
        q = torch.cat((q[..., : sizes.plain_size], self._rotate(q[..., sizes.plain_size :], at)), dim=-1)
        if cache is not None and at.slots is not None:
            latent = cache[0].index_copy_(2, at.slots, latent)
            shared = cache[1].index_copy_(2, at.slots, shared)
        expanded = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (heads, sizes.plain_size + sizes.value_size))
        expanded = expanded.transpose(1, 2)  # [B, Q, C, P + value size]
        k = torch.cat((expanded[..., : sizes.plain_size], shared.expand(-1, heads, -1, -1)), dim=-1)
        v = expanded[..., sizes.plain_size :]
        out = F.scaled_dot_product_attention(
            q, k, v, at.mask, is_causal=at.mask is None, scale=self.config.softmax_scale
        )
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def _rotate(self, x: Tensor, at: Positions) -> Tensor:
        return rotate_half(pairs_to_halves(x) if self.latent.interleaved else x, at.rotation)
