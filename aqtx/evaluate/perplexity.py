"""Rolling perplexity over documents, with strict token accounting.

**Accounting.** Every token of a document except its first is scored exactly once; the first has nothing before it and
is never scored (where the tokenizer prepends a start token, that is the one not scored). Documents are never joined,
so no token sees another document. Each document's negative log-likelihood is a sum in nats, and the perplexity of a
set is exp(sum of sums / number of scored tokens).

**Windows.** The model is given at most `window` tokens at a time. A document of n tokens has n - 1 targets; they are
cut into runs of at most `window - context`, and each run is scored by a window that ends with it and reaches back as
far as `window` tokens allow. With `context` 0 the windows but the last do not overlap, so a window's first target
sees one token only; with context c every target but those near the document's start sees at least c + 1 tokens.

**Batches** hold windows of equal length only: nothing is padded, so a score does not depend on its neighbours.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aqtx.blockwise.block_scores import many_with, ranks_of, rows_at_once, why_not_finite
from aqtx.errors import InputError
from aqtx.program.token_ids import context_of
from aqtx.schema import parse_fields
from aqtx.text.tokens import Document

MAX_WINDOW = 2048  # tokens that a model is given at a time, unless its context is shorter or a recipe says more

Progress = Callable[..., Iterable[Any]]
Forward = Callable[[Tensor], Tensor]  # ids [B, S] -> logits [B, S, V]


@dataclass(frozen=True)
class DocumentScores:
    """Negative log-likelihood in nats and number of scored tokens of each document, in the documents' order."""

    domains: tuple[str, ...]
    nll: np.ndarray  # float64 [num_documents]
    num_tokens: np.ndarray  # int64 [num_documents]
    window: int
    context: int

    @property
    def mean(self) -> float:
        """Nats per token over all documents."""
        return float(self.nll.sum() / self.num_tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return float(np.exp(self.mean))

    def to_json(self) -> dict[str, Any]:
        """Plain lists; float64 survives the way through JSON."""
        return {**asdict(self), "nll": self.nll.tolist(), "num_tokens": self.num_tokens.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "DocumentScores":
        """What `to_json` gave.

        Raises:
            InputError: it is nothing of the kind.
        """
        told, problems = parse_fields(_Told, data if isinstance(data, dict) else {}, "scores")
        if told is None:
            raise InputError(*problems)
        if not len(told.domains) == len(told.nll) == len(told.num_tokens):
            raise InputError("scores: domains, nll and num_tokens are not of one length")
        if not all(0 < count < 2**63 for count in told.num_tokens):
            raise InputError("scores: num_tokens must be positive")
        return cls(told.domains, np.array(told.nll), np.array(told.num_tokens, np.int64), told.window, told.context)

    def of(self, domain: str) -> "DocumentScores":
        """The scores of one domain's documents."""
        chosen = np.array([name == domain for name in self.domains])
        return DocumentScores(
            tuple(name for name in self.domains if name == domain),
            self.nll[chosen],
            self.num_tokens[chosen],
            self.window,
            self.context,
        )


@dataclass(frozen=True)
class _Told:
    """`DocumentScores` as JSON has it."""

    domains: tuple[str, ...]
    nll: list[float]
    num_tokens: list[int]
    window: int
    context: int


@dataclass(frozen=True)
class Window:
    """ids[start:stop] of a document go in; of their successors the last `num_scored` are scored."""

    document: int
    start: int
    stop: int
    num_scored: int

    @property
    def length(self) -> int:
        """Tokens that go in."""
        return self.stop - self.start


def cut_windows(document: int, length: int, *, window: int, context: int = 0) -> Iterator[Window]:
    """The windows of one document of `length` tokens: their scored targets tile positions 1 .. length - 1."""
    first = 1  # position of the run's first target
    while first < length:
        # The first run has no earlier context to keep, so it takes the whole window.
        last = min(first + (window if first == 1 else window - context), length)
        yield Window(document, max(0, last - 1 - window), last - 1, last - first)
        first = last


def window_of(config: Mapping[str, Any], asked: int | None = None) -> int:
    """Tokens to give a model at a time: as asked, else its context by config.json, at most MAX_WINDOW."""
    return asked or min(context_of(config) or MAX_WINDOW, MAX_WINDOW)


def evaluate_perplexity(
    forward: Forward,
    documents: Sequence[Document],
    *,
    window: int,
    batch_size: int = 8,
    context: int = 0,
    progress: Progress | None = None,
) -> DocumentScores:
    """Score documents with `forward(ids [B, S]) -> logits [B, S, V]`; see the module's text for what is counted."""
    if not 0 <= context < window:
        raise InputError(f"the window is {window} tokens and its context {context}: it must be 0 to {window - 1}")
    windows = [
        piece
        for index, document in enumerate(documents)
        for piece in cut_windows(index, len(document.ids), window=window, context=context)
    ]
    batches = list(batches_of(windows, forward, batch_size))
    ranks, losses = ranks_of(forward), list[list[float]]()
    mine = ranks.mine(batches)
    logits = many_with(forward)([ids_of(documents, batch) for batch in mine])
    for batch in progress(mine, description="perplexity") if progress else mine:
        losses.append(losses_of(next(logits), documents, batch))
    next(logits, None)  # to its end, where it clears up
    nll = np.zeros(len(documents))
    shared = ranks.gather(losses)
    for place, batch in enumerate(batches):  # in one order, whoever scored what: the same sums, bit for bit
        for piece, loss in zip(batch, shared[place % ranks.size][place // ranks.size], strict=True):
            nll[piece.document] += loss
    if broken := [index for index, loss in enumerate(nll) if not np.isfinite(loss)]:
        raise InputError(
            f"the model's predictions on evaluation document {broken[0]} are not finite ({nll[broken[0]]}): "
            f"{why_not_finite(forward)}"
        )
    num_tokens = np.array([len(document.ids) - 1 for document in documents], dtype=np.int64)
    return DocumentScores(tuple(document.domain for document in documents), nll, num_tokens, window, context)


def batches_of(
    windows: Sequence[Window], forward: Callable[[Tensor], Tensor], batch_size: int
) -> Iterator[list[Window]]:
    """Windows of equal length together, longest first: what runs out of memory does so at once."""
    ordered = sorted(windows, key=lambda piece: -piece.length)
    for length, group in itertools.groupby(ordered, key=lambda piece: piece.length):
        equal, rows = list(group), rows_at_once(forward, length, batch_size)
        for start in range(0, len(equal), rows):
            yield equal[start : start + rows]


def ids_of(documents: Sequence[Document], batch: Sequence[Window]) -> Tensor:
    """What the model is given for a batch of equal windows."""
    return torch.stack([documents[piece.document].ids[piece.start : piece.stop] for piece in batch])  # [B, S]


@torch.no_grad()
def losses_of(logits: Tensor, documents: Sequence[Document], batch: Sequence[Window]) -> list[float]:
    """Summed losses of a batch's windows: logits [B, S, V]."""
    losses = []
    for row, piece in zip(logits, batch, strict=True):
        targets = documents[piece.document].ids[piece.stop + 1 - piece.num_scored : piece.stop + 1]
        # One row at a time in float32: the upcast of a whole batch of logits would be the largest tensor of the run.
        scored = row[-piece.num_scored :].float()
        losses.append(float(torch.nn.functional.cross_entropy(scored, targets.to(scored.device), reduction="sum")))
    return losses
