"""Parts that the decoders of this folder share. Pure torch, exportable, no word of quantization.

Legend of shapes: B sequences, S positions, T = B * S tokens, C cache slots, H hidden size,
Q query heads, G key-value heads, D head size, R of it rotated, I intermediate size, E experts, k experts a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aqtx.formats.grouped_linear import grouped_linear

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; one `aten.rms_norm` node when traced."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class OffsetRMSNorm(RMSNorm):
    """The same with a gain of 1 + weight, as Gemma stores it; in float32, where 1 + weight loses no digits."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float() + 1, self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x)); `gelu` puts GELU's tanh form in silu's place (GeGLU)."""

    def __init__(self, hidden: int, intermediate: int, *, bias: bool = False, gelu: bool = False) -> None:
        super().__init__()
        self.gelu = gelu
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H]."""
        gate = self.gate_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        out: Tensor = self.down_proj(gate * self.up_proj(x))
        return out


class Experts(nn.Module):
    """The experts of a layer, one stacked parameter per projection, named as in the checkpoint."""

    def __init__(
        self, num_experts: int, hidden: int, intermediate: int, *, names: tuple[str, str, str] = GATE_UP_DOWN
    ) -> None:
        super().__init__()
        self.names = names
        inner, outer = (intermediate, hidden), (hidden, intermediate)
        for name, shape in zip(names, (inner, inner, outer), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(num_experts, *shape)))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs: x [T, H], weights and experts [T, k] -> [T, H]."""
        gate, up, down = (self.get_parameter(name) for name in self.names)
        return run_experts(x, weights, experts, (gate, up, down))


def route(logits: Tensor, experts_per_token: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """The k most probable experts of each token: logits [T, E] -> weights, experts [T, k]."""
    probabilities = logits.softmax(-1, dtype=torch.float32)
    weights, experts = probabilities.topk(experts_per_token, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


def route_chosen(logits: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """The k best experts of each token and a softmax over them alone: logits [T, E] -> weights, experts [T, k]."""
    best, experts = logits.float().topk(experts_per_token, dim=-1)
    return best.softmax(-1).to(logits.dtype), experts


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order of the T * k (token, expert) pairs by expert, and each expert's end row.

    experts [T, k] -> order [T * k], offsets [E] int32. Free of symbolic arithmetic, so that the
    traced blocks stay pure functions of their inputs.
    """
    ranked, order = experts.reshape(-1).sort(stable=True)
    last = torch.arange(1, num_experts + 1, device=experts.device)
    return order, torch.searchsorted(ranked, last).to(torch.int32)


def run_experts(x: Tensor, weights: Tensor, experts: Tensor, stacks: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Sum of the chosen experts' outputs: x [T, H], weights and experts [T, k] -> [T, H].

    `stacks` are gate and up [E, I, H] and down [E, H, I].
    """
    gate, up, down = stacks
    order, offsets = sort_by_expert(experts, gate.shape[0])
    rows = x[order // experts.shape[1]]  # [T * k, H]
    inner = F.silu(grouped_linear(rows, gate, offsets)) * grouped_linear(rows, up, offsets)
    return combine(grouped_linear(inner, down, offsets), weights, order)


def combine(out: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """Experts' outputs summed by token: out [T * k, H] in `order` [T * k] by expert, weights [T, k] -> [T, H]."""
    out = out[order.argsort()].view(-1, weights.shape[1], out.shape[-1])  # [T, k, H]
    return (out * weights.unsqueeze(-1)).sum(1)
