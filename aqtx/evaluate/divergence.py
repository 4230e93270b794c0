"""How far a model's predictions lie from another's on documents: Kullback-Leibler divergence, token by token.

A change of loss is the difference of two noisy numbers; the divergence is never negative and its noise is that of the
change alone, so that it tells plans apart whose losses do not differ beyond their interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aqtx.blockwise.block_scores import many_with
from aqtx.evaluate.perplexity import DocumentScores, Forward, batches_of, cut_windows, ids_of, losses_of
from aqtx.text.tokens import Document

ROWS = 512  # tokens whose distributions are compared at a time, in float32


@dataclass(frozen=True)
class Compared:
    """One model on documents: its own loss, and how far its predictions lie from the reference's (`nll` holds KL)."""

    loss: DocumentScores
    divergence: DocumentScores


@torch.no_grad()
def evaluate_divergence(
    before: Forward, after: Sequence[Forward], documents: Sequence[Document], *, window: int, batch_size: int = 8
) -> list[Compared]:
    """Losses, and KL(before || after), summed over each document's scored tokens; one record for each of `after`.

    Documents are cut as for perplexity. All models are held at once; `before` runs once for each batch.

    Args:
        before: ids [B, S] -> logits [B, S, V].
        after: the same of the models to compare.
        documents: of two tokens or more.
        window: tokens that a model is given at a time.
        batch_size: windows of equal length in one batch.
    """
    windows = [
        piece
        for index, document in enumerate(documents)
        for piece in cut_windows(index, len(document.ids), window=window)
    ]
    sums = np.zeros((2, len(after), len(documents)))
    batches = list(batches_of(windows, before, batch_size))
    ids = [ids_of(documents, batch) for batch in batches]
    scored = [many_with(forward)(ids) for forward in (before, *after)]
    for batch in batches:
        reference, *others = (next(logits) for logits in scored)
        for row, logits in enumerate(others):
            for piece, loss in zip(batch, losses_of(logits, documents, batch), strict=True):
                sums[0, row, piece.document] += loss
            for piece, p, q in zip(batch, reference, logits, strict=True):
                sums[1, row, piece.document] += divergence_of(p[-piece.num_scored :], q[-piece.num_scored :])
    for rest in scored:
        next(rest, None)  # to its end, where it clears up
    num_tokens = np.array([len(document.ids) - 1 for document in documents], dtype=np.int64)
    domains = tuple(document.domain for document in documents)
    made = [[DocumentScores(domains, row, num_tokens, window, 0) for row in kind] for kind in sums]
    return [Compared(loss, divergence) for loss, divergence in zip(*made, strict=True)]


def divergence_of(p: Tensor, q: Tensor) -> float:
    """Sum over tokens of KL between the softmaxes of logits [T, V], in nats."""
    total = 0.0
    for one, other in zip(p.split(ROWS), q.split(ROWS), strict=True):
        one, other = one.float().log_softmax(-1), other.float().log_softmax(-1)
        total += float((one.exp() * (one - other)).sum(-1).double().sum())
    return total
