"""config.json as the decoders read it: typed fields, HF's defaults, and every problem told at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aqtx.errors import InputError
from aqtx.models.rotary import ROPE_KINDS, Rope


class Fields:
    """A config.json under the eyes of one architecture. Problems are collected and raised by `check`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.problems: list[str] = []

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number; `default` where the key is missing or null."""
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.problems.append(f"config.json: {key} must be a positive whole number, not {value!r:.80}")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        """A real number."""
        value = self.config.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            self.problems.append(f"config.json: {key} must be a finite number, not {value!r:.80}")
            return default
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value; null counts as false."""
        value = self.config.get(key, default)
        if value not in (None, False, True):
            self.problems.append(f"config.json: {key} must be true or false, not {value!r:.80}")
        return bool(value)

    def only(self, key: str, supported: object) -> None:
        """Refuse by name any value other than the one supported; a missing key is the supported value."""
        value = self.config.get(key)
        if value is not None and value != supported:
            self.problems.append(f"config.json: {key} {value!r} is not supported, only {supported!r}")

    def layer_types(self, supported: Sequence[str]) -> list[str] | None:
        """The type of each layer where config.json lists them: supported ones, as many as there are layers."""
        types = self.config.get("layer_types")
        if types is None:
            return None
        if not isinstance(types, list) or len(types) != self.config.get("num_hidden_layers"):
            self.problems.append("config.json: layer_types must be a list with an entry for each layer")
            return None
        unknown = [kind for kind in types if kind not in supported]
        self.problems += [f"config.json: layer type {kind!r:.80} is not supported" for kind in unknown[:1]]
        return None if unknown else types

    def partial_rotary_factor(self, default: float) -> float:
        """The share of a head's dimensions that positions rotate, in either spelling of the config."""
        rope = self.config.get("rope_parameters") or {}
        value = rope.get("partial_rotary_factor", self.config.get("partial_rotary_factor", default))
        if not isinstance(value, (int, float)) or not 0 < value <= 1:
            self.problems.append(f"config.json: partial_rotary_factor must lie between 0 and 1, not {value!r}")
            return default
        return float(value)

    def rope(self, default_theta: float = 10000.0) -> Rope:
        """The rotary variant; unknown ones are refused by name."""
        kind = Rope.kind_of(self.config)
        if kind not in ROPE_KINDS:
            supported = ", ".join(ROPE_KINDS)
            self.problems.append(f"config.json: rope type {kind!r} is not supported, only {supported}")
            return Rope(theta=default_theta)
        return Rope.from_dict(self.config, default_theta)

    def check(self) -> None:
        """Raise what was found."""
        if self.problems:
            raise InputError(*self.problems)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What all decoders of this folder have. Per layer: `windows` (None = full attention), `rotated`."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_eps: float
    rope: Rope
    window_rope: Rope | None = None  # of layers with a sliding window, where it is another one
    embedding_scale: float | None = None  # rounded to the model's dtype, as Gemma does
    embedding_multiplier: float = 1.0  # not rounded, as Granite does
    logits_divisor: float = 1.0
    rotated_pairs: bool = False  # positions turn neighbours, not the halves of a head
    sinks: bool = False  # each query head may attend to nothing, with a learned score
    tie_word_embeddings: bool
    rotary_size: int  # dimensions of a head that positions rotate, the first ones
    softmax_scale: float | None = None  # of attention scores; None is head_size^-1/2
    qkv_bias: bool = False
    out_bias: bool = False
    head_bias: bool = False
    output_gate: bool = False  # queries come with a sigmoid gate on what attention puts out
    qk_norm: str | None = None  # "row": over all heads together, "head": each head by itself
    clip_qkv: float | None = None
    windows: tuple[int | None, ...] = ()
    rotated: tuple[bool, ...] = ()

    @classmethod
    def read(cls, fields: Fields, *, default_theta: float = 10000.0, tied: bool = False, **own: Any) -> "DecoderConfig":
        """The shared fields; `own` are what the architecture decides for itself.

        An architecture that can rotate a part of a head only says so with `rotary_size`; others refuse the key.
        """
        if "rotary_size" not in own:
            fields.only("partial_rotary_factor", 1.0)
        fields.only("hidden_act", "silu")
        heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        layers = fields.integer("num_hidden_layers")
        head_size = own.get("head_size") or fields.integer("head_dim", max(1, hidden // heads))
        shared: dict[str, Any] = {
            "vocab_size": fields.integer("vocab_size"),
            "hidden_size": hidden,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": fields.integer("num_key_value_heads", heads),
            "head_size": head_size,
            "rotary_size": head_size,
            "norm_eps": fields.number("rms_norm_eps", 1e-6),
            "rope": fields.rope(default_theta),
            "tie_word_embeddings": fields.flag("tie_word_embeddings", tied),
            "windows": (None,) * layers,
            "rotated": (True,) * layers,
        }
        if shared["num_heads"] % shared["num_kv_heads"]:
            fields.problems.append(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads")
        return cls(**(shared | own))


def sliding_windows(fields: Fields, size: int | None, default_types: list[str]) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types` where config.json has it, else from the family's rule."""
    types = fields.layer_types(("full_attention", "sliding_attention")) or default_types
    return tuple(size if kind == "sliding_attention" else None for kind in types)
