"""Qwen3-MoE (arXiv 2505.09388; Qwen3-30B-A3B, Qwen3-235B-A22B): q/k norm per head, routed experts, no shared one.

Some layers may be dense. Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aqtx.models.attention import Attention
from aqtx.models.config import DecoderConfig, Fields
from aqtx.models.decoder import Block, CausalLM
from aqtx.models.layers import Experts, SwiGLU, route


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    intermediate_size: int  # of dense layers
    expert_size: int
    num_experts: int
    experts_per_token: int
    norm_topk_prob: bool
    sparse_layers: frozenset[int]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Qwen3MoeConfig":
        """Read Hugging Face's config.json of a `Qwen3MoeForCausalLM`."""
        fields = Fields(config)
        layers, bias = fields.integer("num_hidden_layers"), fields.flag("attention_bias", False)
        dense, step = set(config.get("mlp_only_layers") or ()), fields.integer("decoder_sparse_step", 1)
        windowed = fields.flag("use_sliding_window", False) and config.get("sliding_window", 4096) is not None
        window = fields.integer("sliding_window", 4096) if windowed else None
        made = cls(
            decoder=DecoderConfig.read(
                fields, qk_norm="head", qkv_bias=bias, out_bias=bias, windows=(window,) * layers
            ),
            intermediate_size=fields.integer("intermediate_size"),
            expert_size=fields.integer("moe_intermediate_size"),
            num_experts=fields.integer("num_experts" if "num_experts" in config else "num_local_experts"),
            experts_per_token=fields.integer("num_experts_per_tok"),
            norm_topk_prob=fields.flag("norm_topk_prob", False),
            sparse_layers=frozenset(i for i in range(layers) if i not in dense and (i + 1) % step == 0),
        )
        fields.check()
        return made


class SparseMoe(nn.Module):
    """Router and experts."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.decoder.hidden_size
        self.gate = nn.Linear(hidden, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, hidden, config.expert_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        tokens = x.flatten(0, 1)  # [T, H]
        weights, experts = route(self.gate(tokens), self.config.experts_per_token, normalize=self.config.norm_topk_prob)
        out: Tensor = self.experts(tokens, weights, experts)
        return out.view_as(x)


class Qwen3Moe(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__(config.decoder, [self._block(config, layer) for layer in range(config.decoder.num_layers)])
        self.config = config

    @staticmethod
    def _block(config: Qwen3MoeConfig, layer: int) -> nn.Module:
        attention, hidden = Attention(config.decoder, layer), config.decoder.hidden_size
        if layer in config.sparse_layers:
            return Block(config.decoder, attention, SparseMoe(config))
        return Block(config.decoder, attention, SwiGLU(hidden, config.intermediate_size))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Qwen3Moe":
        """The model of a config.json."""
        return cls(Qwen3MoeConfig.from_dict(config))
