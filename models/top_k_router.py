"""Routers that score experts one by one and choose within groups, as DeepSeek-V2, V3 and GLM-4.5 do.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): scores are sigmoids; a bias per expert, which balances loads without a
loss, takes part in the choice and not in the weights. DeepSeek-V2 (arXiv 2405.04434, section 2.1.2): softmax scores and
no bias; a group counts by its best expert instead of its best two. Legend of shapes: see `layers.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How experts are chosen and weighed."""

    num_experts: int
    experts_per_token: int
    score: str  # "sigmoid" with a correction bias, "softmax" without
    num_groups: int = 1
    kept_groups: int = 1
    normalize: bool = False
    scale: float = 1.0

    def problems(self) -> list[str]:
        """Why no k experts can be chosen within these groups, in a sentence."""
        if self.num_groups == 1:
            return []
        each, rest = divmod(self.num_experts, self.num_groups)
        if rest:
            return [f"config.json: n_routed_experts {self.num_experts} is not a multiple of n_group {self.num_groups}"]
        if each < 2 and self.score == "sigmoid":
            return [f"config.json: n_group {self.num_groups} makes groups of one expert, which count by their best two"]
        if self.kept_groups > self.num_groups:
            return [f"config.json: topk_group {self.kept_groups} is more than n_group {self.num_groups}"]
        if self.kept_groups * each < self.experts_per_token:
            held = f"the {self.kept_groups * each} experts in topk_group {self.kept_groups} groups"
            return [f"config.json: num_experts_per_tok {self.experts_per_token} is more than {held}"]
        return []


class TopKRouter(nn.Module):
    """Scores of all experts in float32, whatever the model's dtype; the k best of the best groups."""

    def __init__(self, hidden: int, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.weight = nn.Parameter(torch.empty(routing.num_experts, hidden))
        self.weight.keeps_dtype = True  # type: ignore[attr-defined]
        if routing.score == "sigmoid":
            self.e_score_correction_bias = nn.Parameter(torch.zeros(routing.num_experts))
            self.e_score_correction_bias.keeps_dtype = True  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [T, H] -> weights (in the tokens' dtype), experts [T, k]."""
        logits, routing = F.linear(tokens.float(), self.weight), self.routing
        scores = logits.sigmoid() if routing.score == "sigmoid" else logits.softmax(-1)
        choice = scores + self.e_score_correction_bias if routing.score == "sigmoid" else scores
        if routing.num_groups > 1:
            choice = self._within_groups(choice)
        experts = choice.topk(routing.experts_per_token, dim=-1).indices
        weights = scores.gather(1, experts)
        if routing.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return (weights * routing.scale).to(tokens.dtype), experts

    def _within_groups(self, choice: Tensor) -> Tensor:
        """Scores [T, E] of the experts in the best groups; the others' can no longer be chosen."""
        routing = self.routing
        grouped = choice.unflatten(-1, (routing.num_groups, -1))  # [T, groups, E / groups]
        counted = 2 if routing.score == "sigmoid" else 1
        best = grouped.topk(counted, dim=-1).values.sum(-1)  # [T, groups]
        kept = best.topk(routing.kept_groups, dim=-1).indices
        mask = torch.zeros_like(best).scatter(1, kept, 1.0)
        return grouped.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).flatten(1)
