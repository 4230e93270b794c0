"""What router finetuning minimises: a weighted sum of three losses, each in nats per token.

cross_entropy: next-token loss on the text. logits: KL(teacher || student) of next-token distributions. router:
KL(teacher || student) of routing distributions, mean over layers; it pulls each token back to its own experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = tuple[Tensor, tuple[Tensor, ...]]  # logits [B, S, V], router logits [B * S, E] per layer


@dataclass(frozen=True)
class LossWeights:
    """How much each loss counts."""

    cross_entropy: float
    logits: float
    router: float

    @property
    def needs_teacher(self) -> bool:
        """Whether the unquantized model is asked at all."""
        return self.logits > 0 or self.router > 0

    def __call__(self, student: Outputs, teacher: Outputs | None, ids: Tensor) -> Tensor:
        """The sum, per sequence [B]."""
        total = torch.zeros(len(ids), device=ids.device)
        if self.cross_entropy:
            total = total + self.cross_entropy * cross_entropy(student[0], ids)
        if teacher is not None and self.logits:
            total = total + self.logits * divergence(teacher[0], student[0]).mean(-1)
        if teacher is not None and self.router and student[1]:
            total = total + self.router * router_divergence(teacher[1], student[1], len(ids))
        return total


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token loss of each sequence, [B]; the first token is not scored."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(-1)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) over the last dimension."""
    expected, found = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)


def router_divergence(teacher: Sequence[Tensor], student: Sequence[Tensor], batch: int) -> Tensor:
    """Mean over layers and tokens for each sequence, [B]."""
    layers = [divergence(a, b).view(batch, -1).mean(-1) for a, b in zip(teacher, student, strict=True)]
    return torch.stack(layers).mean(0)
