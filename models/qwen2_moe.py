"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): routed experts and one shared expert behind a gate.

Beside the k routed experts every token passes a shared expert, scaled by the sigmoid of a linear
gate of its own. Some layers may be dense. Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aqtx.models.attention import Attention
from aqtx.models.config import DecoderConfig, Fields, sliding_windows
from aqtx.models.decoder import Block, CausalLM
from aqtx.models.layers import Experts, SwiGLU, route


@dataclass(frozen=True)
class Qwen2MoeConfig:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    intermediate_size: int  # of dense layers
    expert_size: int
    shared_size: int
    num_experts: int
    experts_per_token: int
    norm_topk_prob: bool
    sparse_layers: frozenset[int]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Qwen2MoeConfig":
        """Read Hugging Face's config.json of a `Qwen2MoeForCausalLM`."""
        fields = Fields(config)
        layers, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step", 1)
        dense = set(config.get("mlp_only_layers") or ())
        decoder = DecoderConfig.read(fields, qkv_bias=fields.flag("qkv_bias", True), windows=_windows(fields, layers))
        made = cls(
            decoder=decoder,
            intermediate_size=fields.integer("intermediate_size"),
            expert_size=fields.integer("moe_intermediate_size"),
            shared_size=fields.integer("shared_expert_intermediate_size"),
            num_experts=fields.integer("num_experts"),
            experts_per_token=fields.integer("num_experts_per_tok"),
            norm_topk_prob=fields.flag("norm_topk_prob", False),
            sparse_layers=frozenset(i for i in range(layers) if i not in dense and (i + 1) % step == 0),
        )
        fields.check()
        return made


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """transformers' rule: where windows are used, every other layer below `max_window_layers` has one."""
    if not fields.flag("use_sliding_window", False):
        return (None,) * layers
    last = fields.integer("max_window_layers", 28)
    default = ["sliding_attention" if i % 2 == 0 and i < last else "full_attention" for i in range(layers)]
    return sliding_windows(fields, fields.integer("sliding_window", 4096), default)


class SparseMoe(nn.Module):
    """Router, routed experts, shared expert and its gate."""

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.decoder.hidden_size
        self.gate = nn.Linear(hidden, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, hidden, config.expert_size)
        self.shared_expert = SwiGLU(hidden, config.shared_size)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        tokens = x.flatten(0, 1)  # [T, H]
        weights, experts = route(self.gate(tokens), self.config.experts_per_token, normalize=self.config.norm_topk_prob)
        routed = self.experts(tokens, weights, experts)
        shared = torch.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)
        out: Tensor = (routed + shared).view_as(x)
        return out


class Qwen2Moe(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: Qwen2MoeConfig) -> None:
        super().__init__(config.decoder, [self._block(config, i) for i in range(config.decoder.num_layers)])
        self.config = config

    @staticmethod
    def _block(config: Qwen2MoeConfig, layer: int) -> nn.Module:
        attention, hidden = Attention(config.decoder, layer), config.decoder.hidden_size
        if layer in config.sparse_layers:
            return Block(config.decoder, attention, SparseMoe(config))
        return Block(config.decoder, attention, SwiGLU(hidden, config.intermediate_size))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Qwen2Moe":
        """The model of a config.json."""
        return cls(Qwen2MoeConfig.from_dict(config))
