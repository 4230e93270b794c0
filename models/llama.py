"""The dense Llama-like family: Llama, SmolLM, Mistral, Qwen2, Qwen3, SmolLM3.

One architecture: pre-norm attention and SwiGLU. The members differ in biases, in q/k norms (Qwen3,
each head by itself), in sliding windows and in layers without rotary positions (SmolLM3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aqtx.models.attention import Attention
from aqtx.models.config import DecoderConfig, Fields, sliding_windows
from aqtx.models.decoder import Block, CausalLM
from aqtx.models.layers import SwiGLU


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that shape the model."""

    decoder: DecoderConfig
    intermediate_size: int
    mlp_bias: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read Hugging Face's config.json of one of the family, told apart by its `model_type`."""
        fields = Fields(config)
        read = FAMILY[config.get("model_type", "llama")]
        made = cls(
            decoder=read(fields),
            intermediate_size=fields.integer("intermediate_size"),
            mlp_bias=fields.flag("mlp_bias", False),
        )
        fields.check()
        return made


def _llama(fields: Fields) -> DecoderConfig:
    bias = fields.flag("attention_bias", False)
    return DecoderConfig.read(fields, qkv_bias=bias, out_bias=bias)


def _mistral(fields: Fields) -> DecoderConfig:
    # A missing key means 4096 to transformers; null means full attention.
    window = fields.integer("sliding_window") if fields.config.get("sliding_window", 4096) else None
    window = 4096 if "sliding_window" not in fields.config else window
    return DecoderConfig.read(fields, windows=(window,) * fields.integer("num_hidden_layers"))


def _qwen2(fields: Fields) -> DecoderConfig:
    return DecoderConfig.read(fields, qkv_bias=True, windows=_upper_windows(fields))


def _qwen3(fields: Fields) -> DecoderConfig:
    bias = fields.flag("attention_bias", False)
    head = fields.integer("head_dim", 128)
    return DecoderConfig.read(
        fields, qk_norm="head", qkv_bias=bias, out_bias=bias, head_size=head, windows=_upper_windows(fields)
    )


def _smollm3(fields: Fields) -> DecoderConfig:
    layers, every = fields.integer("num_hidden_layers"), fields.integer("no_rope_layer_interval", 4)
    rotated = fields.config.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(layers)]
    bias, windows = fields.flag("attention_bias", False), (None,) * layers
    if fields.flag("use_sliding_window", False) and fields.config.get("sliding_window"):
        default = ["full_attention" if rotated[i] else "sliding_attention" for i in range(layers)]
        windows = sliding_windows(fields, fields.integer("sliding_window"), default)  # type: ignore[assignment]
    return DecoderConfig.read(
        fields,
        default_theta=2e6,
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        rotated=tuple(bool(flag) for flag in rotated),
        windows=windows,
    )


def _upper_windows(fields: Fields) -> tuple[int | None, ...]:
    """Qwen's rule: where windows are used, the layers from `max_window_layers` on have one."""
    layers = fields.integer("num_hidden_layers")
    if not fields.flag("use_sliding_window", False) or not fields.config.get("sliding_window", 4096):
        return (None,) * layers
    first = int(fields.config.get("max_window_layers", 28))
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return sliding_windows(fields, fields.integer("sliding_window", 4096), default)


FAMILY = {"llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "smollm3": _smollm3}


class Llama(CausalLM):
    """ids [B, S] -> logits [B, S, vocabulary]."""

    def __init__(self, config: LlamaConfig) -> None:
        hidden, size = config.decoder.hidden_size, config.intermediate_size
        super().__init__(
            config.decoder,
            [
                Block(config.decoder, Attention(config.decoder, i), SwiGLU(hidden, size, bias=config.mlp_bias))
                for i in range(config.decoder.num_layers)
            ],
        )
        self.config = config

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Llama":
        """The model of a config.json."""
        return cls(LlamaConfig.from_dict(config))
