"""gpt-oss (arXiv 2508.10925): attention sinks, every other layer windowed, biases everywhere, a clamped SwiGLU.

Each query head has a learned score for attending to nothing. Experts multiply (up + 1) by gate * sigmoid(alpha gate),
both clamped. Their biases of gate and up lie in turn in one parameter, as checkpoints keep them.
Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aqtx.formats.grouped_linear import grouped_linear
from aqtx.models.attention import Attention
from aqtx.models.config import DecoderConfig, Fields, sliding_windows
from aqtx.models.decoder import Block, CausalLM
from aqtx.models.layers import combine, route_chosen, sort_by_expert

YARN = {  # where config.json says nothing of positions
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class GptOssConfig:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    expert_size: int
    num_experts: int
    experts_per_token: int
    alpha: float
    limit: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GptOssConfig":
        """Read Hugging Face's config.json of a `GptOssForCausalLM`."""
        if not (config.get("rope_parameters") or config.get("rope_scaling")):
            config = {**config, "rope_scaling": YARN}
        fields = Fields(config)
        layers, bias = fields.integer("num_hidden_layers"), fields.flag("attention_bias", True)
        window = fields.integer("sliding_window", 128)
        default = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
        decoder = DecoderConfig.read(
            fields,
            default_theta=150000.0,
            head_size=fields.integer("head_dim", 64),
            norm_eps=fields.number("rms_norm_eps", 1e-5),
            qkv_bias=bias,
            out_bias=bias,
            sinks=True,
            windows=sliding_windows(fields, window, default),
        )
        made = cls(
            decoder=decoder,
            expert_size=fields.integer("intermediate_size"),
            num_experts=fields.integer("num_local_experts", 128),
            experts_per_token=fields.integer("num_experts_per_tok", 4),
            alpha=fields.number("swiglu_alpha", 1.702),
            limit=fields.number("swiglu_limit", 7.0),
        )
        fields.check()
        return made


class ClampedExperts(nn.Module):
    """The experts of a layer with biases: stacked matrices, and one bias a row of gate and up in turn."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.alpha, self.limit = config.alpha, config.limit
        experts, hidden, inner = config.num_experts, config.decoder.hidden_size, config.expert_size
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(experts, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs: x [T, H], weights and experts [T, k] -> [T, H]."""
        order, offsets = sort_by_expert(experts, self.gate_proj.shape[0])
        expert_of_row = experts.reshape(-1)[order]
        rows, bias = x[order // experts.shape[1]], self.gate_up_proj_bias[expert_of_row]  # [T * k, H], [T * k, 2 I]
        gate = (grouped_linear(rows, self.gate_proj, offsets) + bias[:, ::2]).clamp(max=self.limit)
        up = (grouped_linear(rows, self.up_proj, offsets) + bias[:, 1::2]).clamp(-self.limit, self.limit)
        inner = (up + 1) * (gate * (gate * self.alpha).sigmoid())
        out = grouped_linear(inner, self.down_proj, offsets) + self.down_proj_bias[expert_of_row]
        return combine(out, weights, order)


class GptOssMoe(nn.Module):
    """Router and experts."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.experts_per_token = config.experts_per_token
        self.router = nn.Linear(config.decoder.hidden_size, config.num_experts)
        self.experts = ClampedExperts(config)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        tokens = x.flatten(0, 1)  # [T, H]
        weights, experts = route_chosen(self.router(tokens), self.experts_per_token)
        out: Tensor = self.experts(tokens, weights, experts)
        return out.view_as(x)


class GptOss(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: GptOssConfig) -> None:
        decoder = config.decoder
        super().__init__(
            decoder,
            [Block(decoder, Attention(decoder, layer), GptOssMoe(config)) for layer in range(decoder.num_layers)],
        )
        self.config = config

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GptOss":
        """The model of a config.json."""
        return cls(GptOssConfig.from_dict(config))
