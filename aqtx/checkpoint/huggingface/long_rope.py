"""transformers' LongRoPE as arithmetic that a graph holds: what depends on the sequence's length is chosen in it.

transformers writes the frequencies of the length at hand into a buffer, or branches on the length in Python; neither
can be traced. There are two states, up to `original_max_position_embeddings` and beyond, each frequencies and a scale
on cos and sin. Names prove nothing here either (Phi-3.5-MoE has a scale of its own beyond, but keeps its frequencies):
the module itself is run in both states, and an arithmetic that does not equal it to the bit is refused.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from aqtx.errors import InputError

KIND = "longrope"
_PROBED = 64  # positions
CosAndSin = tuple[Tensor, Tensor]


def traceable_long_rope(model: nn.Module) -> None:
    """Let every LongRoPE module of a model choose frequencies and scale by the length, in the graph.

    Raises:
        InputError: a module computes something else.
    """
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        by_layer: dict[str | None, Any] = dict(kinds) if isinstance(kinds, dict) else {None: kinds}
        states = {layer: _States(module, layer, name) for layer, kind in by_layer.items() if kind == KIND}
        if states:
            module.forward = _bind(states, module.forward)


class _States:
    """Both states of a module: frequencies [D / 2], buffers of the module, and scales."""

    def __init__(self, module: Any, layer: str | None, name: str) -> None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope = module.config.rope_parameters if layer is None else module.config.rope_parameters[layer]
        self.longest = int(rope["original_max_position_embeddings"])
        self.module, self.prefix = module, "" if layer is None else f"{layer}_"
        long, _ = ROPE_INIT_FUNCTIONS[KIND](
            module.config, torch.device("cpu"), seq_len=self.longest + 1, layer_type=layer
        )
        short = getattr(module, f"{self.prefix}original_inv_freq")
        self.scales = _own_scale(module, layer, self.longest), _own_scale(module, layer, self.longest + 1)
        beyond = next((found for found in (long, short) if self._holds(found, self.longest + 1, layer)), None)
        if beyond is None or not self._holds(short, self.longest, layer):
            raise InputError(f"{name}: {type(module).__name__} computes no LongRoPE that aqtx can trace")
        for state, value in (("short", short), ("beyond", beyond)):
            module.register_buffer(f"{self.prefix}{state}_freq", value.clone(), persistent=False)

    def _holds(self, frequencies: Tensor, length: int, layer: str | None) -> bool:
        """Whether frequencies give the module's own cos and sin in a text of a length."""
        scale = self.scales[length > self.longest]
        found = cos_and_sin(_places(length), frequencies, scale, torch.float32)
        own = _own(self.module, layer, length)
        return all(torch.equal(one, other) for one, other in zip(found, own, strict=True))

    def __call__(self, x: Tensor, positions: Tensor) -> CosAndSin:
        """cos and sin [B, S, D] in the dtype of x, for positions [B, S]."""
        beyond = positions.max() + 1 > self.longest
        short, long = (self.module.get_buffer(f"{self.prefix}{state}_freq") for state in ("short", "beyond"))
        scale: Tensor | float = self.scales[0]
        if self.scales[0] != self.scales[1]:
            scale = torch.where(beyond, self.scales[1], self.scales[0])
        return cos_and_sin(positions, torch.where(beyond, long, short), scale, x.dtype)


def cos_and_sin(positions: Tensor, frequencies: Tensor, scale: Tensor | float, dtype: torch.dtype) -> CosAndSin:
    """Positions [B, S] and frequencies [D / 2] -> cos and sin [B, S, D], both times the scale."""
    angles = positions.unsqueeze(-1).float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _places(length: int) -> Tensor:
    """Some positions [1, S] of a text of a length: the first ones and the last one, which tells the length."""
    return torch.tensor([[*range(min(length - 1, _PROBED)), length - 1]], device="cpu")


def _own(module: nn.Module, layer: str | None, length: int) -> CosAndSin:
    """What the module itself makes of a text of a length; run on a copy, which it writes into."""
    named = {} if layer is None else {"layer_type": layer}
    with torch.device("cpu"), torch.no_grad():
        found: CosAndSin = copy.deepcopy(module)(torch.zeros(1, device="cpu"), _places(length), **named)
    return found


def _own_scale(module: nn.Module, layer: str | None, length: int) -> float:
    """The scale of a text of a length: the cosine at position 0."""
    return float(_own(module, layer, length)[0].flatten()[0])


def _bind(states: dict[str | None, _States], other: Callable[..., CosAndSin]) -> Callable[..., CosAndSin]:
    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> CosAndSin:
        if layer_type in states:
            return states[layer_type](x, position_ids)
        return other(x, position_ids) if layer_type is None else other(x, position_ids, layer_type)

    return forward
