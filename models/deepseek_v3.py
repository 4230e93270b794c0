"""DeepSeek-V2, V3 and R1 (arXiv 2405.04434, 2412.19437): latent attention and grouped fine-grained experts.

The first layers are dense; the others have routed experts beside shared ones, which are one feed-forward of their
summed width. Layers for predicting several tokens at once, which checkpoints hold behind the last, are left out, as
transformers leaves them out. Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from aqtx.models.config import DecoderConfig, Fields
from aqtx.models.decoder import Block, CausalLM
from aqtx.models.latent_attention import LatentAttention, LatentConfig, softmax_scale
from aqtx.models.layers import SwiGLU
from aqtx.models.shared_experts import SharedExpertsMoe
from aqtx.models.top_k_router import Routing


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    latent: LatentConfig
    routing: Routing
    intermediate_size: int  # of dense layers
    expert_size: int
    num_shared_experts: int
    num_dense_layers: int
    mlp_bias: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "DeepseekV3Config":
        """Read Hugging Face's config.json of a `DeepseekV2ForCausalLM` or `DeepseekV3ForCausalLM`."""
        fields = Fields(config)
        second = config.get("model_type") == "deepseek_v2"
        latent = LatentConfig.read(fields, interleaved=second or fields.flag("rope_interleave", True))
        decoder = DecoderConfig.read(
            fields,
            head_size=latent.key_size,
            rotary_size=latent.rotary_size,
            softmax_scale=softmax_scale(config, latent.key_size),
        )
        made = cls(
            decoder=decoder,
            latent=latent,
            routing=_softmax_routing(fields) if second else sigmoid_routing(fields, groups=8, kept=4, scale=2.5),
            intermediate_size=fields.integer("intermediate_size"),
            expert_size=fields.integer("moe_intermediate_size"),
            num_shared_experts=fields.integer("n_shared_experts", 2 if second else 1),
            num_dense_layers=int(config.get("first_k_dense_replace", 0 if second else 3) or 0),
            mlp_bias=fields.flag("mlp_bias", False),
        )
        fields.check()
        return made


def sigmoid_routing(fields: Fields, *, groups: int = 1, kept: int = 1, scale: float = 1.0) -> Routing:
    """Scores with a correction bias; groups count by their two best experts. The numbers are a family's defaults."""
    fields.only("scoring_func", "sigmoid")
    routing = Routing(
        num_experts=fields.integer("n_routed_experts"),
        experts_per_token=fields.integer("num_experts_per_tok"),
        score="sigmoid",
        num_groups=fields.integer("n_group", groups),
        kept_groups=fields.integer("topk_group", kept),
        normalize=fields.flag("norm_topk_prob", True),
        scale=fields.number("routed_scaling_factor", scale),
    )
    fields.problems += routing.problems()
    return routing


def _softmax_routing(fields: Fields) -> Routing:
    """DeepSeek-V2's: in groups where `topk_method` says so. Weights are never normalised, as transformers has it."""
    fields.only("scoring_func", "softmax")
    method = fields.config.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        fields.problems.append(f"config.json: topk_method {method!r} is not supported")
    grouped = method == "group_limited_greedy"
    routing = Routing(
        num_experts=fields.integer("n_routed_experts", 64),
        experts_per_token=fields.integer("num_experts_per_tok"),
        score="softmax",
        num_groups=fields.integer("n_group") if grouped else 1,
        kept_groups=fields.integer("topk_group") if grouped else 1,
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    fields.problems += routing.problems()
    return routing


class LatentBlock(Block):
    """Pre-norm latent attention and feed-forward."""

    def __init__(self, config: DeepseekV3Config, layer: int) -> None:
        hidden = config.decoder.hidden_size
        if layer < config.num_dense_layers:
            mlp: nn.Module = SwiGLU(hidden, config.intermediate_size, bias=config.mlp_bias)
        else:
            width = config.num_shared_experts * config.expert_size
            shared = SwiGLU(hidden, width, bias=config.mlp_bias)
            mlp = SharedExpertsMoe(hidden, config.routing, config.expert_size, shared)
        super().__init__(config.decoder, LatentAttention(config.decoder, config.latent), mlp)


class DeepseekV3(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config.decoder, [LatentBlock(config, layer) for layer in range(config.decoder.num_layers)])
        self.config = config

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "DeepseekV3":
        """The model of a config.json."""
        return cls(DeepseekV3Config.from_dict(config))
