"""Qwen3.5 and 3.6 MoE, the text model: Qwen3-Next's block with DeltaNet's projections apart and no dense layers.

Published checkpoints hold a vision tower too: its weights and the layers for predicting several tokens at once are
left out, as transformers' `AutoModelForCausalLM` leaves them out. Positions of text turn all three parts of a head
alike, so that they are plain rotary positions. Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from typing import Any

from aqtx.models.config import DecoderConfig, Fields
from aqtx.models.gated_delta import DeltaConfig
from aqtx.models.qwen2_moe import Qwen2MoeConfig
from aqtx.models.qwen3_next import Qwen3Next, Qwen3NextConfig, linear_layers


def read_config(config: Mapping[str, Any]) -> Qwen3NextConfig:
    """Read Hugging Face's config.json of a `Qwen3_5MoeForCausalLM`."""
    fields = Fields(config)
    bias, head = fields.flag("attention_bias", False), fields.integer("head_dim", 256)
    decoder = DecoderConfig.read(
        fields,
        head_size=head,
        rotary_size=int(head * fields.partial_rotary_factor(0.25)),
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        output_gate=True,
    )
    moe = Qwen2MoeConfig(
        decoder=decoder,
        intermediate_size=1,  # no layer is dense
        expert_size=fields.integer("moe_intermediate_size", 512),
        shared_size=fields.integer("shared_expert_intermediate_size", 512),
        num_experts=fields.integer("num_experts", 256),
        experts_per_token=fields.integer("num_experts_per_tok", 8),
        norm_topk_prob=True,
        sparse_layers=frozenset(range(decoder.num_layers)),
    )
    made = Qwen3NextConfig(
        decoder=decoder,
        delta=DeltaConfig.read(fields, fused=False),
        moe=moe,
        linear_layers=linear_layers(fields, decoder.num_layers),
    )
    fields.check()
    return made


class Qwen35Moe(Qwen3Next):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Qwen35Moe":
        """The model of a config.json."""
        return cls(read_config(config))
