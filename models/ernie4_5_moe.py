"""ERNIE 4.5 MoE, text (21B-A3B, 300B-A47B): softmax scores with a correction bias, shared experts, rotated pairs.

The bias of an expert takes part in the choice and not in the weights, which are divided by their sum. Layers outside a
range, or between its steps, are dense. Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aqtx.models.attention import Attention
from aqtx.models.config import DecoderConfig, Fields
from aqtx.models.decoder import Block, CausalLM
from aqtx.models.layers import Experts, SwiGLU


@dataclass(frozen=True, kw_only=True)
class ErnieMoeConfig:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    intermediate_size: int  # of dense layers
    expert_size: int
    num_experts: int
    num_shared_experts: int
    experts_per_token: int
    smallest_sum: float  # that weights are divided by
    sparse_layers: frozenset[int]
    bias: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ErnieMoeConfig":
        """Read Hugging Face's config.json of an `Ernie4_5_MoeForCausalLM`."""
        fields = Fields(config)
        layers, bias = fields.integer("num_hidden_layers"), fields.flag("use_bias", False)
        decoder = DecoderConfig.read(
            fields,
            default_theta=500000.0,
            tied=True,
            norm_eps=fields.number("rms_norm_eps", 1e-5),
            qkv_bias=bias,
            out_bias=bias,
            head_bias=bias,
            rotated_pairs=True,
        )
        made = cls(
            decoder=decoder,
            intermediate_size=fields.integer("intermediate_size"),
            expert_size=fields.integer("moe_intermediate_size"),
            num_experts=fields.integer("moe_num_experts"),
            num_shared_experts=int(fields.number("moe_num_shared_experts", 2)),
            experts_per_token=fields.integer("moe_k"),
            smallest_sum=fields.number("moe_norm_min", 1e-12),
            sparse_layers=_sparse_layers(fields, layers),
            bias=bias,
        )
        fields.check()
        return made


def _sparse_layers(fields: Fields, layers: int) -> frozenset[int]:
    """Every `moe_layer_interval`-th layer from the first to the last of a range; -1 is the last of all."""
    first, last = (int(fields.number(f"moe_layer_{end}_index", value)) for end, value in (("start", 1), ("end", -1)))
    step, last = fields.integer("moe_layer_interval", 1), layers - 1 if last == -1 else last
    return frozenset(layer for layer in range(layers) if (layer + 1) % step == 0 and first <= layer <= last)


class Statics(nn.Module):
    """The correction bias, under the name that checkpoints give it."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.e_score_correction_bias = nn.Parameter(torch.zeros(1, num_experts))
        self.e_score_correction_bias.keeps_dtype = True  # type: ignore[attr-defined]


class Gate(nn.Module):
    """Probabilities of all experts in float32, whatever the model's dtype."""

    def __init__(self, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))
        self.weight.keeps_dtype = True  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T, H] -> probabilities [T, E]."""
        return F.linear(tokens.float(), self.weight).softmax(-1)


class ErnieMoe(nn.Module):
    """Router, routed experts, and the shared ones as one feed-forward."""

    def __init__(self, config: ErnieMoeConfig) -> None:
        super().__init__()
        self.config = config
        hidden, shared = config.decoder.hidden_size, config.num_shared_experts * config.expert_size
        self.gate = Gate(hidden, config.num_experts)
        self.moe_statics = Statics(config.num_experts)
        self.experts = Experts(config.num_experts, hidden, config.expert_size)
        self.shared_experts = SwiGLU(hidden, shared, bias=config.bias) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        tokens = x.flatten(0, 1)  # [T, H]
        probabilities = self.gate(tokens)
        choice = probabilities + self.moe_statics.e_score_correction_bias
        experts = choice.topk(self.config.experts_per_token, dim=-1).indices
        weights = probabilities.gather(1, experts)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=self.config.smallest_sum)
        out: Tensor = self.experts(tokens, weights.to(x.dtype), experts)
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        return out.view_as(x)


class Ernie45Moe(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: ErnieMoeConfig) -> None:
        super().__init__(config.decoder, [self._block(config, layer) for layer in range(config.decoder.num_layers)])
        self.config = config

    @staticmethod
    def _block(config: ErnieMoeConfig, layer: int) -> nn.Module:
        hidden, attention = config.decoder.hidden_size, Attention(config.decoder, layer)
        if layer in config.sparse_layers:
            return Block(config.decoder, attention, ErnieMoe(config))
        return Block(config.decoder, attention, SwiGLU(hidden, config.intermediate_size, bias=config.bias))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Ernie45Moe":
        """The model of a config.json."""
        return cls(ErnieMoeConfig.from_dict(config))
