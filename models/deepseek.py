"""DeepSeek-MoE v1 (arXiv 2401.06066): fine-grained routed experts beside shared ones, first layer dense.

The shared experts of a layer are one feed-forward of their summed width; every token passes it
unscaled. `transformers` has no class for this architecture (its `deepseek_v2` is another one), and
the code on the hub needs `trust_remote_code`, which is never set. Legend of shapes: see `layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from aqtx.models.attention import Attention
from aqtx.models.config import DecoderConfig, Fields
from aqtx.models.decoder import Block, CausalLM
from aqtx.models.layers import Experts, SwiGLU, route


@dataclass(frozen=True)
class DeepseekConfig:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    intermediate_size: int  # of dense layers
    expert_size: int
    num_shared_experts: int
    num_experts: int
    experts_per_token: int
    norm_topk_prob: bool
    sparse_layers: frozenset[int]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "DeepseekConfig":
        """Read the config.json of deepseek-ai's `DeepseekForCausalLM`."""
        fields = Fields(config)
        fields.only("scoring_func", "softmax")
        layers, bias = fields.integer("num_hidden_layers"), fields.flag("attention_bias", False)
        dense, step = int(config.get("first_k_dense_replace") or 0), fields.integer("moe_layer_freq", 1)
        routed = config.get("n_routed_experts") is not None
        made = cls(
            decoder=DecoderConfig.read(fields, qkv_bias=bias, out_bias=bias),
            intermediate_size=fields.integer("intermediate_size"),
            expert_size=fields.integer("moe_intermediate_size"),
            num_shared_experts=int(config.get("n_shared_experts") or 0),
            num_experts=fields.integer("n_routed_experts", 1),
            experts_per_token=fields.integer("num_experts_per_tok", 1),
            norm_topk_prob=fields.flag("norm_topk_prob", False),
            sparse_layers=frozenset(i for i in range(layers) if routed and i >= dense and i % step == 0),
        )
        fields.check()
        return made


class SparseMoe(nn.Module):
    """Router, routed experts, shared experts."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.decoder.hidden_size
        self.gate = nn.Linear(hidden, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, hidden, config.expert_size)
        if config.num_shared_experts:
            self.shared_experts = SwiGLU(hidden, config.num_shared_experts * config.expert_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        tokens = x.flatten(0, 1)  # [T, H]
        normalize = self.config.norm_topk_prob and self.config.experts_per_token > 1
        weights, experts = route(self.gate(tokens), self.config.experts_per_token, normalize=normalize)
        out: Tensor = self.experts(tokens, weights, experts)
        if self.config.num_shared_experts:
            out = out + self.shared_experts(tokens)
        return out.view_as(x)


class Deepseek(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config.decoder, [self._block(config, i) for i in range(config.decoder.num_layers)])
        self.config = config

    @staticmethod
    def _block(config: DeepseekConfig, layer: int) -> nn.Module:
        attention, hidden = Attention(config.decoder, layer), config.decoder.hidden_size
        if layer in config.sparse_layers:
            return Block(config.decoder, attention, SparseMoe(config))
        return Block(config.decoder, attention, SwiGLU(hidden, config.intermediate_size))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Deepseek":
        """The model of a config.json."""
        return cls(DeepseekConfig.from_dict(config))
