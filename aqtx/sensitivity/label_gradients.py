"""The gradient of the cross-entropy for the logits, with labels drawn from the model or taken from the text."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aqtx.blockwise.backward import Head
from aqtx.registry import Context


def drawn_labels(sizes: Sequence[int], context: Context) -> Head:
    """Labels drawn from the model's own predictions, sequence by sequence in their order.

    The draws of all sequences come from one stream of random numbers, of which each takes T * V: so they are the same
    whatever runs in one batch, and whichever process has a batch.
    """
    generator = torch.Generator(context.device).manual_seed(context.seed)
    drawn = 0

    def labels(logits: Tensor, sequence: int) -> Tensor:
        nonlocal drawn
        probabilities = logits.softmax(-1)
        while drawn <= sequence:  # the largest of p / noise is a draw from p
            noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
            drawn += 1
        return (probabilities / noise).argmax(-1)

    return _head(sizes, labels)


def given_labels(sizes: Sequence[int], targets: Tensor) -> Head:
    """The text's own labels [n, T]."""
    return _head(sizes, lambda logits, sequence: targets[sequence].to(logits.device))


def _head(sizes: Sequence[int], labels: Callable[[Tensor, int], Tensor]) -> Head:
    """d/dlogits of each sequence's summed -ln p(label): p - onehot(label); float32 for one sequence at a time."""

    def gradient(logits: Tensor, batch: int) -> Tensor:
        found, start = torch.empty_like(logits), sum(sizes[:batch])
        for row, scores in enumerate(logits):
            scores = scores.float()
            targets = labels(scores, start + row)
            probabilities = scores.softmax(-1)
            probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1
            found[row] = probabilities
        return found

    return gradient
