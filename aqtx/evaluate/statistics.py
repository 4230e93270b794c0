"""Perplexities with their intervals, and paired changes between models scored on the same documents."""

import numpy as np

from aqtx.errors import InputError
from aqtx.evaluate.perplexity import DocumentScores
from aqtx.numerics.intervals import Interval, bootstrap_ratio


def perplexity_interval(scores: DocumentScores, *, seed: int = 0) -> Interval:
    """Perplexity with its interval."""
    return bootstrap_ratio(scores.nll, scores.num_tokens, seed=seed, transform=np.exp)


def paired_change(before: DocumentScores, after: DocumentScores, *, seed: int = 0) -> Interval:
    """Mean change in nats per token, after minus before, with both scored on the same documents in each resample."""
    same = before.domains == after.domains and np.array_equal(before.num_tokens, after.num_tokens)
    if not same or (before.window, before.context) != (after.window, after.context):
        raise InputError("the two perplexities were not taken on the same documents and windows, so they do not pair")
    return bootstrap_ratio(after.nll - before.nll, before.num_tokens, seed=seed)


def perplexity_report(
    before: DocumentScores | None, after: DocumentScores, *, seed: int = 0
) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """The `perplexity` and `perplexity_by_domain` entries of report.json; without `before` only `after` is filled."""
    domains = dict.fromkeys(after.domains)
    by_domain = {name: _entry(before.of(name) if before else None, after.of(name), seed=seed) for name in domains}
    return _entry(before, after, seed=seed), by_domain


def _entry(before: DocumentScores | None, after: DocumentScores, *, seed: int) -> dict[str, object]:
    return {
        "before": perplexity_interval(before, seed=seed).to_json() if before else None,
        "after": perplexity_interval(after, seed=seed).to_json(),
        "change": paired_change(before, after, seed=seed).to_json() if before else None,
        "num_documents": len(after.nll),
        "num_tokens": int(after.num_tokens.sum()),
        "window": after.window,
        "context": after.context,
    }
