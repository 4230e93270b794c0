"""Rotary position frequencies, read from a Hugging Face config in its old or its new spelling.

Variants: `default`; `linear` (positions divided by a factor); `dynamic` (NTK: the base grows with
the sequence once it is longer than trained for); `llama3` (low frequencies divided, smooth in
between); `yarn` (arXiv 2309.00071: a ramp between divided and plain, and a scale on cos and sin).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary variant and its constants, named as in config.json."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    max_positions: int = 2048
    original_max_positions: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies cos and sin
    mscale_all_dim: float = 0.0  # what DeepSeek's scale of scores is made of

    @staticmethod
    def kind_of(config: Mapping[str, Any]) -> str:
        """The variant's name, in either spelling of the config."""
        rope = _section(config)
        return str(rope.get("rope_type", rope.get("type", "default")))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], default_theta: float = 10000.0) -> "Rope":
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        rope = _section(config)
        longest = int(config.get("max_position_embeddings") or 2048)
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        return cls(
            theta=float(rope.get("rope_theta") or config.get("rope_theta") or default_theta),
            kind=cls.kind_of(config),
            factor=float(rope.get("factor") or 1.0),
            max_positions=longest,
            original_max_positions=int(original or longest),
            low_freq_factor=float(rope.get("low_freq_factor") or 1.0),
            high_freq_factor=float(rope.get("high_freq_factor") or 4.0),
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            truncate=bool(rope.get("truncate", True)),
            attention_factor=_yarn_attention(rope) if cls.kind_of(config) == "yarn" else 1.0,
            mscale_all_dim=float(rope.get("mscale_all_dim") or 0.0),
        )

    @property
    def usual_attention(self) -> float:
        """YaRN's scale on cos and sin where nothing else is said."""
        return _yarn_term(self.factor)

    def frequencies(self, head_size: int) -> Tensor:
        """Radians per position [D / 2], float32 on the CPU."""
        plain = 1.0 / self.theta ** exponents(head_size)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            return self._llama3(plain)
        return self._yarn(plain, head_size) if self.kind == "yarn" else plain

    def _llama3(self, plain: Tensor) -> Tensor:
        """Long waves divided, short ones kept, a linear blend between the two lengths."""
        turns = self.original_max_positions * plain / (2 * math.pi)  # over the trained length
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return keep * plain + (1 - keep) * plain / self.factor

    def _yarn(self, plain: Tensor, head_size: int) -> Tensor:
        """Dimensions that turn often keep their frequency, those that turn seldom are divided."""

        def dimension(turns: float) -> float:
            length = self.original_max_positions / (turns * 2 * math.pi)
            return head_size * math.log(length) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        high = high + 0.001 if low == high else high  # the ramp is a step, not a division by zero
        index = torch.arange(head_size // 2, dtype=torch.float32, device="cpu")
        divide = ((index - low) / (high - low)).clamp(0, 1)
        return plain / self.factor * divide + plain * (1 - divide)


def exponents(head_size: int) -> Tensor:
    """2 i / D for each pair of dimensions."""
    return torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size


def _section(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})


def _yarn_attention(rope: Mapping[str, Any]) -> float:
    """YaRN's scale on cos and sin: given, or 0.1 ln(factor) + 1, or a ratio of two such terms."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    factor = float(rope["factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _yarn_term(factor, rope["mscale"]) / _yarn_term(factor, rope["mscale_all_dim"])
    return _yarn_term(factor)


def _yarn_term(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


class Rotary(nn.Module):
    """cos and sin of each position; the frequencies [D / 2] are a buffer outside the checkpoint."""

    inv_freq: Tensor
    exponents: Tensor

    def __init__(self, rope: Rope, head_size: int) -> None:
        super().__init__()
        self.rope = rope
        self.power = head_size / (head_size - 2) if head_size > 2 else 1.0
        self.register_buffer("inv_freq", rope.frequencies(head_size), persistent=False)
        if rope.kind == "dynamic":
            self.register_buffer("exponents", exponents(head_size), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [B or 1, S] -> cos and sin [B or 1, 1, S, D] in `dtype`."""
        places = positions.float().unsqueeze(-1)  # [B, S, 1]
        angles = places * (self._stretched(places) if self.rope.kind == "dynamic" else self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        scale = self.rope.attention_factor
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def _stretched(self, places: Tensor) -> Tensor:
        """Frequencies [B, 1, D / 2] of each sequence's own length; as trained up to `max_positions`."""
        length = (places.amax(dim=1, keepdim=True) + 1).clamp(min=self.rope.max_positions)
        growth = self.rope.factor * length / self.rope.max_positions - (self.rope.factor - 1)
        return self.inv_freq * growth ** (-self.power * self.exponents)
