"""Routed experts beside shared ones that every token passes unscaled: DeepSeek-V2 and V3, GLM-4.5."""

from torch import Tensor, nn

from aqtx.models.layers import Experts
from aqtx.models.top_k_router import Routing, TopKRouter


class SharedExpertsMoe(nn.Module):
    """Router, routed experts, and the shared experts as one feed-forward."""

    def __init__(self, hidden: int, routing: Routing, expert_size: int, shared: nn.Module) -> None:
        super().__init__()
        self.gate = TopKRouter(hidden, routing)
        self.experts = Experts(routing.num_experts, hidden, expert_size)
        self.shared_experts = shared

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        tokens = x.flatten(0, 1)  # [T, H]
        weights, experts = self.gate(tokens)
        out: Tensor = self.experts(tokens, weights, experts) + self.shared_experts(tokens)
        return out.view_as(x)
