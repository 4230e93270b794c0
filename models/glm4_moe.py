"""GLM-4.5 and GLM-4.6 (arXiv 2508.06471): grouped queries with half-rotated heads, and DeepSeek-V3's experts.

The first layers are dense. Layers for predicting several tokens at once are left out, as transformers leaves them out.
Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from aqtx.models.attention import Attention
from aqtx.models.config import DecoderConfig, Fields
from aqtx.models.decoder import Block, CausalLM
from aqtx.models.deepseek_v3 import sigmoid_routing
from aqtx.models.layers import SwiGLU
from aqtx.models.shared_experts import SharedExpertsMoe
from aqtx.models.top_k_router import Routing


@dataclass(frozen=True, kw_only=True)
class Glm4MoeConfig:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    routing: Routing
    intermediate_size: int  # of dense layers
    expert_size: int
    num_shared_experts: int
    num_dense_layers: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Glm4MoeConfig":
        """Read Hugging Face's config.json of a `Glm4MoeForCausalLM`."""
        fields = Fields(config)
        heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        head = fields.integer("head_dim", max(1, hidden // heads))
        decoder = DecoderConfig.read(
            fields,
            head_size=head,
            rotary_size=int(head * fields.partial_rotary_factor(0.5)),
            norm_eps=fields.number("rms_norm_eps", 1e-5),
            qkv_bias=fields.flag("attention_bias", False),
            qk_norm="head" if fields.flag("use_qk_norm", False) else None,
        )
        made = cls(
            decoder=decoder,
            routing=sigmoid_routing(fields),
            intermediate_size=fields.integer("intermediate_size"),
            expert_size=fields.integer("moe_intermediate_size"),
            num_shared_experts=fields.integer("n_shared_experts", 1),
            num_dense_layers=int(config.get("first_k_dense_replace", 1) or 0),
        )
        fields.check()
        return made


class Glm4Moe(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: Glm4MoeConfig) -> None:
        super().__init__(config.decoder, [self._block(config, layer) for layer in range(config.decoder.num_layers)])
        self.config = config

    @staticmethod
    def _block(config: Glm4MoeConfig, layer: int) -> nn.Module:
        hidden, attention = config.decoder.hidden_size, Attention(config.decoder, layer)
        if layer < config.num_dense_layers:
            return Block(config.decoder, attention, SwiGLU(hidden, config.intermediate_size))
        shared = SwiGLU(hidden, config.num_shared_experts * config.expert_size)
        return Block(config.decoder, attention, SharedExpertsMoe(hidden, config.routing, config.expert_size, shared))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Glm4Moe":
        """The model of a config.json."""
        return cls(Glm4MoeConfig.from_dict(config))
