"""Granite MoE (IBM Granite 3.0 and 3.1): Mixtral's block with multipliers on embeddings, sums, scores and logits.

Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aqtx.models.attention import Attention, Cache, Positions
from aqtx.models.config import DecoderConfig, Fields
from aqtx.models.decoder import CausalLM
from aqtx.models.layers import Experts, RMSNorm, route_chosen


@dataclass(frozen=True, kw_only=True)
class GraniteMoeConfig:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    expert_size: int
    num_experts: int
    experts_per_token: int
    residual_multiplier: float  # of what attention and feed-forward add

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GraniteMoeConfig":
        """Read Hugging Face's config.json of a `GraniteMoeForCausalLM`."""
        fields = Fields(config)
        bias = fields.flag("attention_bias", False)
        made = cls(
            decoder=DecoderConfig.read(
                fields,
                qkv_bias=bias,
                out_bias=bias,
                softmax_scale=fields.number("attention_multiplier", 1.0),
                embedding_multiplier=fields.number("embedding_multiplier", 1.0),
                logits_divisor=fields.number("logits_scaling", 1.0),
            ),
            expert_size=fields.integer("intermediate_size"),
            num_experts=fields.integer("num_local_experts", 8),
            experts_per_token=fields.integer("num_experts_per_tok", 2),
            residual_multiplier=fields.number("residual_multiplier", 1.0),
        )
        fields.check()
        return made


class Router(nn.Module):
    """The router's one layer, under the name that checkpoints give it."""

    def __init__(self, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.layer = nn.Linear(hidden, num_experts, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T, H] -> logits [T, E]."""
        logits: Tensor = self.layer(tokens)
        return logits


class SparseMoe(nn.Module):
    """Router and experts."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        hidden = config.decoder.hidden_size
        self.router = Router(hidden, config.num_experts)
        self.experts = Experts(config.num_experts, hidden, config.expert_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        tokens = x.flatten(0, 1)  # [T, H]
        weights, experts = route_chosen(self.router(tokens), self.experts_per_token)
        out: Tensor = self.experts(tokens, weights, experts)
        return out.view_as(x)


class GraniteMoeBlock(nn.Module):
    """Pre-norm attention and mixture of experts, both multiplied before they are added."""

    def __init__(self, config: GraniteMoeConfig, layer: int) -> None:
        super().__init__()
        hidden, eps = config.decoder.hidden_size, config.decoder.norm_eps
        self.multiplier = config.residual_multiplier
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
        x = x + self.self_attn(self.input_layernorm(x), at, cache) * self.multiplier
        out: Tensor = x + self.block_sparse_moe(self.post_attention_layernorm(x)) * self.multiplier
        return out


class GraniteMoe(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: GraniteMoeConfig) -> None:
        super().__init__(config.decoder, [GraniteMoeBlock(config, i) for i in range(config.decoder.num_layers)])
        self.config = config

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GraniteMoe":
        """The model of a config.json."""
        return cls(GraniteMoeConfig.from_dict(config))
