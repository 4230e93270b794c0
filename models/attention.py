"""Causal grouped-query attention with rotary positions, as all decoders of this folder have it.

Legend of shapes: see `layers.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aqtx.models.config import DecoderConfig
from aqtx.models.layers import RMSNorm

SINK_COLUMNS = 8  # of which one is used: kernels want heads of a multiple of eight

Cache = tuple[Tensor, Tensor]  # of one layer: keys and values, each [B, G, C, D], or a state; written in place
Rotation = tuple[Tensor, Tensor]  # cos and sin, each [B or 1, 1, S, R]


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a tensor of a cache behind the batch; None stands for the slots, of which a state has none."""

    sizes: tuple[int | None, ...]
    precise: bool = False  # float32 whatever the model's dtype


@dataclass(frozen=True)
class Positions:
    """What attention needs to know of places: rotations and masks, None = causal."""

    rotation: Rotation  # of layers with full attention
    window_rotation: Rotation  # of layers with a sliding window: the same, but for two rotary bases
    mask: Tensor | None  # of layers with full attention
    window_mask: Tensor | None  # of layers with a sliding window
    slots: Tensor | None  # [S] cache slots that this call writes
    valid: Tensor | None = None  # [B, S, 1] false where a token is padding; None where none is


class Attention(nn.Module):
    """Causal attention; norms, biases, clipping and window as the config says."""

    def __init__(self, config: DecoderConfig, layer: int, *, norm: type[RMSNorm] = RMSNorm) -> None:
        super().__init__()
        self.config = config
        self.windowed, self.rotated = config.windows[layer] is not None, config.rotated[layer]
        hidden, queries = config.hidden_size, config.num_heads * config.head_size
        keys = config.num_kv_heads * config.head_size
        self.q_proj = nn.Linear(hidden, 2 * queries if config.output_gate else queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.out_bias)
        if config.sinks:
            self.sinks = nn.Parameter(torch.empty(config.num_heads))
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            self.q_norm = norm(config.head_size if per_head else queries, config.norm_eps)
            self.k_norm = norm(config.head_size if per_head else keys, config.norm_eps)

    @property
    def cache_shapes(self) -> list[CacheShape]:
        """Keys and values."""
        return [CacheShape((self.config.num_kv_heads, None, self.config.head_size))] * 2

    def forward(self, x: Tensor, at: Positions, cache: Cache | None) -> Tensor:
        """x [B, S, H] -> [B, S, H]; a cache is written at `at.slots` and read whole."""
        q, k, v, gate = self.q_proj(x), self.k_proj(x), self.v_proj(x), None
        if self.config.output_gate:
            q, gate = (part.flatten(2) for part in q.unflatten(-1, (self.config.num_heads, -1)).chunk(2, dim=-1))
        if self.config.qk_norm == "row":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.clip_qkv is not None:
            q, k, v = (t.clamp(-self.config.clip_qkv, self.config.clip_qkv) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (-1, self.config.head_size)) for t in (q, k, v))  # [B, S, heads, D]
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rotated:
            rotation = at.window_rotation if self.windowed else at.rotation
            if self.config.rotated_pairs:
                q, k = pairs_to_halves(q), pairs_to_halves(k)
            q, k = rotate_half(q, rotation), rotate_half(k, rotation)
        if cache is not None and at.slots is not None:
            k, v = cache[0].index_copy_(2, at.slots, k), cache[1].index_copy_(2, at.slots, v)
        mask = at.window_mask if self.windowed else at.mask
        gqa, scale = self.config.num_kv_heads != self.config.num_heads, self.config.softmax_scale
        if self.config.sinks:
            scale = self.config.head_size**-0.5 if scale is None else scale
            q, k, v = with_sinks(q, k, v, self.sinks / scale)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa, scale=scale)
        out = out.transpose(1, 2).flatten(2)
        projected: Tensor = self.o_proj(out if gate is None else out * gate.sigmoid())
        return projected


def with_sinks(q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with a first slot whose value is zero and whose score is each query head's own.

    A column more holds the score in queries, one in the key of that slot and zero in all other keys, so that no mask
    of every head is needed.

    Args:
        q: [B, Q, S, D], k: [B, G, C, D], v: [B, G, C, V].
        scores: [Q], divided by the scale of attention.

    Returns:
        [B, Q, S, D + 8], [B, G, 1 + C, D + 8], [B, G, 1 + C, V]; the mask needs a first column too.
    """
    size = q.shape[-1]
    q = F.pad(q, (0, SINK_COLUMNS)) + F.pad(scores.view(-1, 1, 1), (size, SINK_COLUMNS - 1))
    slot = F.pad(F.pad(torch.zeros_like(k[:, :, :1]), (0, 1), value=1.0), (0, SINK_COLUMNS - 1))
    return q, torch.cat((slot, F.pad(k, (0, SINK_COLUMNS))), dim=2), F.pad(v, (0, 0, 1, 0))


def pairs_to_halves(x: Tensor) -> Tensor:
    """Neighbours put half a head apart, in queries and keys alike, so that their products stay."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def rotate_half(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding in the two-halves layout of the Llama family: x [B, heads, S, D], of which the first R turn."""
    cos, sin = rotation
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat((rotate_half(x[..., :size], rotation), x[..., size:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
