"""How far routing moved: tokens whose experts changed, loads, and losses per sequence, on held-out text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aqtx.finetune.losses import cross_entropy, divergence
from aqtx.finetune.routed import Outputs, Scores


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


class Watch:
    """A head that notes what is seen of sequences on the way."""

    def __init__(self, num_routers: int, num_chosen: int) -> None:
        self._chosen: list[list[Tensor]] = [[] for _ in range(num_routers)]
        self._num_chosen = num_chosen
        self._losses: list[Tensor] = []
        self._divergences: list[Tensor] = []

    def see(self, outputs: Outputs, ids: Tensor, expected: Outputs | None = None) -> Tensor:
        """Note outputs for sequences ids [b, S], in order; the losses [b]."""
        logits, routers = outputs
        self._losses.append(cross_entropy(logits, ids))
        if expected is not None:
            self._divergences.append(divergence(expected[0], logits).mean(-1))
        for layer, scores in zip(self._chosen, routers, strict=True):  # none in a dense model
            experts = scores.topk(self._num_chosen, dim=-1).indices
            layer.append(torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, experts, True))
        return self._losses[-1]

    def found(self) -> Routing:
        """All that was seen."""
        chosen = tuple(torch.cat(layer) for layer in self._chosen)
        return Routing(chosen, _joined(self._losses), _joined(self._divergences))


@torch.no_grad()
def measure_routing(
    model: Scores,
    ids: Tensor,
    num_chosen: int,
    trained: Mapping[str, Tensor] | None = None,
    *,
    expected: Callable[[Sequence[int]], Outputs] | None = None,
    batch_size: int = 4,
) -> Routing:
    """Run held-out sequences [n, S]; `expected` tells the teacher's outputs by their places."""
    watch, size = Watch(len(model.routers), num_chosen), model.together(ids.shape[1], batch_size)
    for start in range(0, len(ids), size):
        batch, places = ids[start : start + size], range(start, min(start + size, len(ids)))

        def see(outputs: Outputs, part: slice, batch: Tensor = batch, places: range = places) -> Tensor:
            return watch.see(outputs, batch[part], None if expected is None else expected(places[part]))

        model.scored(batch, trained or {}, see)
    return watch.found()


def routing_of(
    expected: Callable[[Sequence[int]], Outputs], ids: Tensor, *, num_routers: int, num_chosen: int
) -> Routing:
    """The same of outputs that are told by the places of sequences [n, S]."""
    watch = Watch(num_routers, num_chosen)
    for place in range(len(ids)):
        watch.see(expected([place]), ids[place : place + 1])
    return watch.found()


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([part.double().cpu().numpy() for part in parts]) if parts else np.zeros(0)
