"""How far routing moved: tokens whose experts changed, loads, and losses per sequence, on held-out text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aqtx.finetune.losses import cross_entropy, divergence
from aqtx.finetune.routed import Routed


@dataclass(frozen=True)
class Routing:
    """Of each layer the experts chosen for every token, and of each sequence the next-token loss."""

    chosen: tuple[Tensor, ...]  # bool [tokens, E] per layer
    losses: np.ndarray  # float64 [num_sequences], nats per token
    divergences: np.ndarray  # the same of KL(teacher || model); empty without a teacher

    def shift_from(self, other: "Routing") -> list[float]:
        """Per layer, the share of tokens whose set of experts differs."""
        return [float((a != b).any(-1).float().mean()) for a, b in zip(self.chosen, other.chosen, strict=True)]

    def loads(self) -> list[list[float]]:
        """Per layer and expert, the load in units of an even share."""
        return [(layer.float().mean(0) / layer.float().mean()).tolist() for layer in self.chosen]


@torch.no_grad()
def measure_routing(
    model: Routed,
    ids: Tensor,
    num_chosen: int,
    trained: Mapping[str, Tensor] | None = None,
    *,
    teacher: Routed | None = None,
    batch_size: int = 4,
) -> Routing:
    """Run held-out sequences [n, S], and the teacher beside it."""
    chosen: list[list[Tensor]] = [[] for _ in model.routers]
    losses, divergences = [], []
    for batch in ids.split(batch_size):
        logits, routers = model(batch, trained)
        losses.append(cross_entropy(logits, batch))
        if teacher is not None:
            divergences.append(divergence(teacher(batch)[0], logits).mean(-1))
        for layer, scores in zip(chosen, routers, strict=True):  # none in a dense model
            experts = scores.topk(num_chosen, dim=-1).indices
            layer.append(torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, experts, True))
    return Routing(tuple(torch.cat(layer) for layer in chosen), _joined(losses), _joined(divergences))


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([part.double().cpu().numpy() for part in parts]) if parts else np.zeros(0)
