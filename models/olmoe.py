"""OLMoE (arXiv 2409.02060): every layer routes to k of E experts, no renormalised weights, q/k norm.

Module names are the checkpoint's names; the experts of a layer are stacked [E, N, K] a projection.
Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aqtx.models.attention import Attention
from aqtx.models.config import DecoderConfig, Fields
from aqtx.models.decoder import Block, CausalLM
from aqtx.models.layers import Experts, route


@dataclass(frozen=True)
class OlmoeConfig:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    intermediate_size: int
    num_experts: int
    experts_per_token: int
    norm_topk_prob: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "OlmoeConfig":
        """Read Hugging Face's config.json of an `OlmoeForCausalLM`."""
        fields = Fields(config)
        clip = None if config.get("clip_qkv") is None else fields.number("clip_qkv", 0.0)
        bias = fields.flag("attention_bias", False)
        eps = fields.number("rms_norm_eps", 1e-5)
        decoder = DecoderConfig.read(fields, qk_norm="row", clip_qkv=clip, qkv_bias=bias, out_bias=bias, norm_eps=eps)
        made = cls(
            decoder=decoder,
            intermediate_size=fields.integer("intermediate_size"),
            num_experts=fields.integer("num_experts"),
            experts_per_token=fields.integer("num_experts_per_tok"),
            norm_topk_prob=fields.flag("norm_topk_prob", False),
        )
        fields.check()
        return made


class SparseMoe(nn.Module):
    """Router and experts."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.decoder.hidden_size
        self.gate = nn.Linear(hidden, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, hidden, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        tokens = x.flatten(0, 1)  # [T, H]
        weights, experts = route(self.gate(tokens), self.config.experts_per_token, normalize=self.config.norm_topk_prob)
        out: Tensor = self.experts(tokens, weights, experts)
        return out.view_as(x)


class Olmoe(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: OlmoeConfig) -> None:
        blocks: list[nn.Module] = [
            Block(config.decoder, Attention(config.decoder, layer), SparseMoe(config))
            for layer in range(config.decoder.num_layers)
        ]
        super().__init__(config.decoder, blocks)
        self.config = config

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Olmoe":
        """The model of a config.json."""
        return cls(OlmoeConfig.from_dict(config))
