"""Mixtral (arXiv 2401.04088): every layer routes to k of E experts, weights renormalised to sum to 1.

Names are those on disk: `block_sparse_moe.experts.7.w1` (gate), `w3` (up), `w2` (down).
Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aqtx.models.attention import Attention, Cache, Positions
from aqtx.models.config import DecoderConfig, Fields
from aqtx.models.decoder import CausalLM
from aqtx.models.layers import Experts, RMSNorm, route


@dataclass(frozen=True)
class MixtralConfig:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    intermediate_size: int
    num_experts: int
    experts_per_token: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "MixtralConfig":
        """Read Hugging Face's config.json of a `MixtralForCausalLM`."""
        fields = Fields(config)
        window = fields.integer("sliding_window") if config.get("sliding_window") else None
        windows = (window,) * fields.integer("num_hidden_layers")
        eps = fields.number("rms_norm_eps", 1e-5)
        made = cls(
            decoder=DecoderConfig.read(fields, default_theta=1e6, windows=windows, norm_eps=eps),
            intermediate_size=fields.integer("intermediate_size"),
            num_experts=fields.integer("num_local_experts", 8),
            experts_per_token=fields.integer("num_experts_per_tok", 2),
        )
        fields.check()
        return made


class SparseMoe(nn.Module):
    """Router and experts."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.decoder.hidden_size
        self.gate = nn.Linear(hidden, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, hidden, config.intermediate_size, names=("w1", "w3", "w2"))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        tokens = x.flatten(0, 1)  # [T, H]
        weights, experts = route(self.gate(tokens), self.config.experts_per_token, normalize=True)
        out: Tensor = self.experts(tokens, weights, experts)
        return out.view_as(x)


class MixtralBlock(nn.Module):
    """Pre-norm attention and mixture of experts."""

    def __init__(self, config: MixtralConfig, layer: int) -> None:
        super().__init__()
        hidden, eps = config.decoder.hidden_size, config.decoder.norm_eps
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(config.decoder, layer)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.block_sparse_moe = SparseMoe(config)

    @property
    def mixer(self) -> nn.Module:
        """The part that looks at other tokens, and keeps a cache."""
        return self.self_attn

    def forward(self, x: Tensor, at: Positions, cache: Cache | None) -> Tensor:
        """x [B, S, H] -> [B, S, H]; a cache is written at `at.slots` and read whole."""
        x = x + self.self_attn(self.input_layernorm(x), at, cache)
        out: Tensor = x + self.block_sparse_moe(self.post_attention_layernorm(x))
        return out


class Mixtral(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config.decoder, [MixtralBlock(config, i) for i in range(config.decoder.num_layers)])
        self.config = config

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Mixtral":
        """The model of a config.json."""
        return cls(MixtralConfig.from_dict(config))
