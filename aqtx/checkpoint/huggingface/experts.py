"""transformers' fused experts in the canonical form: one `aqtx.grouped_linear` per projection.

transformers keeps the experts of a layer in one 3-D parameter for gate and up together, in layouts
that differ by model. Here gate, up and down become parameters [E, N, K] of their own, so that each
projection of each expert is a site. Registered as the experts implementation `aqtx`.

Legend: T tokens, k experts a token, E experts, I intermediate size, H hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aqtx.errors import InputError
from aqtx.formats.grouped_linear import grouped_linear
from aqtx.models.layers import sort_by_expert

IMPLEMENTATION = "aqtx"
INPUT_OPS = "input_ops"  # the module of an experts module that holds ops by projection


def register() -> None:
    """Make `model.set_experts_implementation("aqtx")` known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' fused experts, as its decorator marks them."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "down_proj")


def projections(experts: nn.Module) -> dict[str, Tensor]:
    """Gate, up and down [E, N, K] of fused experts: views of their parameters, or those split already."""
    if "gate_proj" in experts._parameters:
        return {name: _parameter(experts, name) for name in ("gate_proj", "up_proj", "down_proj")}
    return cut(experts, {name: _parameter(experts, name) for name in fused_names(experts)})


def fused_names(experts: nn.Module) -> tuple[str, str]:
    """The parameters of fused experts as transformers has them."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def cut(experts: nn.Module, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Gate, up and down [E, N, K] from the fused parameters, tensors or pieces of a checkpoint: views all."""
    fused, down = (parameters[name] for name in fused_names(experts))
    if experts.is_transposed:
        fused, down = fused.transpose(1, 2), down.transpose(1, 2)
    if not experts.has_gate:
        return {"up_proj": fused, "down_proj": down}
    if experts.is_concatenated:
        gate, up = fused.chunk(2, 1)
    else:
        gate, up = fused[:, ::2], fused[:, 1::2]
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def _parameter(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value


def split(experts: nn.Module) -> None:
    """Replace the fused parameters of experts on meta by gate, up and down."""
    parts = projections(experts)
    take_out(experts)
    for name, value in parts.items():
        experts.register_parameter(name, nn.Parameter(torch.empty_like(value, memory_format=torch.contiguous_format)))


def take_out(experts: nn.Module) -> None:
    """Remove the fused parameters; what is put in their place is [E, N, K]."""
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        experts._parameters.pop(name, None)
    experts.is_transposed = False  # type: ignore[assignment]


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Sum of the chosen experts' outputs: [T, H], [T, k], [T, k] -> [T, H]."""
    from transformers.integrations.moe import _default_apply_gate

    if self._is_expert_parallel:
        raise InputError("the experts implementation 'aqtx' does not run expert-parallel")
    stacks, per_token = projections(self), top_k_index.shape[1]
    order, offsets = sort_by_expert(top_k_index, stacks["down_proj"].shape[0])
    expert_of_row = top_k_index.reshape(-1)[order] if self.has_bias else order
    rows = hidden_states[order // per_token]  # [T * k, H]
    before = InputsOf(self, offsets)
    up = grouped_linear(before("up_proj", rows), stacks["up_proj"], offsets)
    if not self.has_gate:
        inner = self.act_fn(up + self.up_proj_bias[expert_of_row] if self.has_bias else up)
    elif not self.has_bias and type(self)._apply_gate is _default_apply_gate:
        inner = self.act_fn(grouped_linear(before("gate_proj", rows), stacks["gate_proj"], offsets)) * up
    else:
        gate = grouped_linear(before("gate_proj", rows), stacks["gate_proj"], offsets)
        fused = torch.cat((gate, up), -1) if self.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        inner = self._apply_gate(fused + self.gate_up_proj_bias[expert_of_row] if self.has_bias else fused)
    out = grouped_linear(before("down_proj", inner), stacks["down_proj"], offsets)
    if self.has_bias:
        out = out + self.down_proj_bias[expert_of_row]
    if self.has_post_expert_norm:
        out = self.post_expert_norm(out)
    out = out[order.argsort()].view(-1, per_token, hidden_states.shape[-1])  # [T, k, H]
    return (out * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


class InputsOf:
    """What each projection reads: its input, after the ops that loading a checkpoint put before it."""

    def __init__(self, experts: nn.Module, offsets: Tensor) -> None:
        self.ops: Any = experts._modules.get(INPUT_OPS) or {}
        self.offsets = offsets

    def __call__(self, projection: str, x: Tensor) -> Tensor:
        """x [T * k, K] as the projection reads it."""
        result: Tensor = self.ops[projection](x, self.offsets) if projection in self.ops else x
        return result
