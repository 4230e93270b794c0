"""Qwen3-Next (80B-A3B): three layers of gated DeltaNet to one of gated attention, many small experts, a shared one.

Attention multiplies its output by a sigmoid gate that comes from the same projection as its queries. Norms store their
gain less one. Layers for predicting several tokens at once (`mtp.*`) are left out, as transformers leaves them out.
Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aqtx.models.attention import Attention, Cache, Positions
from aqtx.models.config import DecoderConfig, Fields
from aqtx.models.decoder import CausalLM
from aqtx.models.gated_delta import DeltaConfig, GatedDeltaNet
from aqtx.models.layers import OffsetRMSNorm, SwiGLU
from aqtx.models.qwen2_moe import Qwen2MoeConfig, SparseMoe

KINDS = ("linear_attention", "full_attention")


@dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    delta: DeltaConfig
    moe: Qwen2MoeConfig  # experts as Qwen2-MoE has them
    linear_layers: tuple[bool, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Qwen3NextConfig":
        """Read Hugging Face's config.json of a `Qwen3NextForCausalLM`."""
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
        dense, step = set(config.get("mlp_only_layers") or ()), fields.integer("decoder_sparse_step", 1)
        moe = Qwen2MoeConfig(
            decoder=decoder,
            intermediate_size=fields.integer("intermediate_size", 5632),
            expert_size=fields.integer("moe_intermediate_size"),
            shared_size=fields.integer("shared_expert_intermediate_size"),
            num_experts=fields.integer("num_experts"),
            experts_per_token=fields.integer("num_experts_per_tok"),
            norm_topk_prob=fields.flag("norm_topk_prob", True),
            sparse_layers=frozenset(i for i in range(decoder.num_layers) if i not in dense and (i + 1) % step == 0),
        )
        made = cls(
            decoder=decoder,
            delta=DeltaConfig.read(fields, fused=True),
            moe=moe,
            linear_layers=linear_layers(fields, decoder.num_layers),
        )
        fields.check()
        return made


def linear_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Which layers have linear attention, from `layer_types` or all but every `full_attention_interval`-th."""
    every = fields.integer("full_attention_interval", 4)
    kinds = fields.layer_types(KINDS) or [KINDS[(i + 1) % every == 0] for i in range(layers)]
    return tuple(kind == KINDS[0] for kind in kinds)


class Qwen3NextBlock(nn.Module):
    """Pre-norm attention of one kind or the other, and feed-forward."""

    def __init__(self, config: Qwen3NextConfig, layer: int) -> None:
        super().__init__()
        hidden, eps = config.decoder.hidden_size, config.decoder.norm_eps
        self.linear = config.linear_layers[layer]
        self.input_layernorm = OffsetRMSNorm(hidden, eps)
        if self.linear:
            self.linear_attn = GatedDeltaNet(config.delta)
        else:
            self.self_attn = Attention(config.decoder, layer, norm=OffsetRMSNorm)
        self.post_attention_layernorm = OffsetRMSNorm(hidden, eps)
        sparse = layer in config.moe.sparse_layers
        self.mlp = SparseMoe(config.moe) if sparse else SwiGLU(hidden, config.moe.intermediate_size)

    @property
    def mixer(self) -> nn.Module:
        """The part that looks at other tokens, and keeps a cache."""
        return self.linear_attn if self.linear else self.self_attn

    def forward(self, x: Tensor, at: Positions, cache: Cache | None) -> Tensor:
        """x [B, S, H] -> [B, S, H]; a cache is read and written."""
        x = x + self.mixer(self.input_layernorm(x), at, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Qwen3Next(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        blocks: list[nn.Module] = [Qwen3NextBlock(config, layer) for layer in range(config.decoder.num_layers)]
        super().__init__(config.decoder, blocks, norm=OffsetRMSNorm)
        self.config = config

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Qwen3Next":
        """The model of a config.json."""
        return cls(Qwen3NextConfig.from_dict(config))
