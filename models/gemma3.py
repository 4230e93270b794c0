"""Gemma 3, the text model (arXiv 2503.19786): norms behind attention and feed-forward too, two rotary bases, tied head.

Most layers have a sliding window and a rotary base of their own, every sixth attends to everything. Norms store their
gain less one, embeddings are multiplied by the root of their size. Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aqtx.models.attention import Attention, Cache, Positions
from aqtx.models.config import DecoderConfig, Fields, sliding_windows
from aqtx.models.decoder import CausalLM
from aqtx.models.layers import OffsetRMSNorm, SwiGLU
from aqtx.models.rotary import Rope

WINDOW_PATTERN = 6  # one layer in so many attends to everything


@dataclass(frozen=True, kw_only=True)
class Gemma3Config:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    intermediate_size: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Gemma3Config":
        """Read Hugging Face's config.json of a `Gemma3ForCausalLM`."""
        fields = Fields(config)
        fields.only("hidden_activation", "gelu_pytorch_tanh")
        fields.only("use_bidirectional_attention", False)
        fields.only("attn_logit_softcapping", None)
        fields.only("final_logit_softcapping", None)
        layers, every = fields.integer("num_hidden_layers"), fields.integer("sliding_window_pattern", WINDOW_PATTERN)
        default = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
        bias, size = fields.flag("attention_bias", False), fields.integer("head_dim", 256)
        full, windowed = _ropes(config)
        decoder = DecoderConfig.read(
            fields,
            tied=True,
            head_size=size,
            rope=full,
            window_rope=windowed,
            embedding_scale=fields.integer("hidden_size") ** 0.5,
            softmax_scale=fields.integer("query_pre_attn_scalar", 256) ** -0.5,
            qk_norm="head",
            qkv_bias=bias,
            out_bias=bias,
            windows=sliding_windows(fields, fields.integer("sliding_window", 4096), default),
        )
        made = cls(decoder=decoder, intermediate_size=fields.integer("intermediate_size"))
        fields.check()
        return made


def _ropes(config: Mapping[str, Any]) -> tuple[Rope, Rope]:
    """The rotary variants of full and windowed layers: one section each, or the keys that came before sections."""
    sections = config.get("rope_parameters") or {}
    full = dict(sections.get("full_attention") or config.get("rope_scaling") or {})
    windowed = dict(sections.get("sliding_attention") or {})
    full.setdefault("rope_theta", config.get("rope_theta") or 1e6)
    windowed.setdefault("rope_theta", config.get("rope_local_base_freq") or 1e4)
    longest = config.get("max_position_embeddings") or 131072
    made = [Rope.from_dict({"rope_parameters": part, "max_position_embeddings": longest}) for part in (full, windowed)]
    return made[0], made[1]


class Gemma3Block(nn.Module):
    """Attention and feed-forward between two norms each."""

    def __init__(self, config: Gemma3Config, layer: int) -> None:
        super().__init__()
        hidden, eps = config.decoder.hidden_size, config.decoder.norm_eps
        self.input_layernorm = OffsetRMSNorm(hidden, eps)
        self.self_attn = Attention(config.decoder, layer, norm=OffsetRMSNorm)
        self.post_attention_layernorm = OffsetRMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = OffsetRMSNorm(hidden, eps)
        self.mlp = SwiGLU(hidden, config.intermediate_size, gelu=True)
        self.post_feedforward_layernorm = OffsetRMSNorm(hidden, eps)

    @property
    def mixer(self) -> nn.Module:
        """The part that looks at other tokens, and keeps a cache."""
        return self.self_attn

    def forward(self, x: Tensor, at: Positions, cache: Cache | None) -> Tensor:
        """x [B, S, H] -> [B, S, H]; a cache is written at `at.slots` and read whole."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), at, cache))
        out: Tensor = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return out


class Gemma3(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: Gemma3Config) -> None:
        blocks: list[nn.Module] = [Gemma3Block(config, layer) for layer in range(config.decoder.num_layers)]
        super().__init__(config.decoder, blocks, norm=OffsetRMSNorm)
        self.config = config

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Gemma3":
        """The model of a config.json."""
        return cls(Gemma3Config.from_dict(config))
