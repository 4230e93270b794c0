"""Perplexity and its statistics against plain loops and closed forms."""

import numpy as np
import pytest
import torch

from aqtx.errors import InputError
from aqtx.evaluate.divergence import evaluate_divergence
from aqtx.evaluate.perplexity import DocumentScores, cut_windows, evaluate_perplexity
from aqtx.evaluate.statistics import paired_change, perplexity_interval, perplexity_report
from aqtx.numerics.intervals import bootstrap_ratio, paired_difference
from aqtx.text.tokens import Document

VOCAB = 11


def bigram(ids):
    """A model whose logits depend on the current token only, so that windows cannot change a score."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    return table[ids]


def documents(*lengths):
    source = torch.Generator().manual_seed(1)
    return [
        Document("even" if index % 2 == 0 else "odd", torch.randint(0, VOCAB, (length,), generator=source))
        for index, length in enumerate(lengths)
    ]


def plain_nll(document):
    log_probabilities = bigram(document.ids).log_softmax(-1)
    return -sum(float(log_probabilities[i, document.ids[i + 1]]) for i in range(len(document.ids) - 1))


@pytest.mark.parametrize("window", [3, 64])
def test_divergence_is_summed_over_the_scored_tokens(window):
    """Against torch's own kl_div, token by token; the loss is that of perplexity."""
    texts = documents(9, 5, 2)

    def other(ids):
        return 0.5 * bigram(ids)

    itself, found = evaluate_divergence(bigram, [bigram, other], texts, window=window)
    assert itself.divergence.nll.tolist() == [0.0] * 3
    for document, total in zip(texts, found.divergence.nll, strict=True):
        p, q = (forward(document.ids[:-1]).log_softmax(-1) for forward in (bigram, other))
        assert total == pytest.approx(
            float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")), rel=1e-5
        )
    losses = evaluate_perplexity(other, texts, window=window)
    assert np.array_equal(found.loss.nll, losses.nll) and found.loss.domains == losses.domains


@pytest.mark.parametrize("window", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("context", [0, 1, 5])
def test_every_token_but_the_first_is_scored_exactly_once(window, context):
    if context >= window:
        with pytest.raises(InputError, match="context"):
            evaluate_perplexity(bigram, documents(4), window=window, context=context)
        return
    for length in range(2, 40):
        pieces = list(cut_windows(0, length, window=window, context=context))
        targets = [t for p in pieces for t in range(p.stop + 1 - p.num_scored, p.stop + 1)]
        assert targets == list(range(1, length))
        assert all(p.length <= window and p.num_scored <= p.length for p in pieces)
        least = min((p.length - p.num_scored for p in pieces[1:]), default=context)
        assert least >= context, "a later window sees less context than promised"


def test_sums_equal_a_plain_loop_and_do_not_depend_on_windows_or_batches():
    texts = documents(2, 9, 30, 30, 17, 9)
    expected = [plain_nll(document) for document in texts]
    for window, batch_size, context in [(64, 1, 0), (8, 4, 0), (8, 3, 5), (1, 2, 0)]:
        scores = evaluate_perplexity(bigram, texts, window=window, batch_size=batch_size, context=context)
        np.testing.assert_allclose(scores.nll, expected, rtol=1e-5)
        assert scores.num_tokens.tolist() == [1, 8, 29, 29, 16, 8]


def test_batches_are_of_equal_length_within_the_size_asked_for():
    shapes = []

    def forward(ids):
        shapes.append(tuple(ids.shape))
        return bigram(ids)

    evaluate_perplexity(forward, documents(9, 30, 9, 9), window=8, batch_size=2)
    assert sorted(shapes, reverse=True) == [(2, 8), (2, 8), (2, 8), (1, 8)]


def test_uniform_logits_give_the_vocabulary_size_and_a_point_interval():
    scores = evaluate_perplexity(lambda ids: torch.zeros(*ids.shape, VOCAB), documents(5, 6, 7), window=16)
    interval = perplexity_interval(scores)
    assert interval.value == pytest.approx(VOCAB, rel=1e-6)
    assert interval.low == pytest.approx(VOCAB, rel=1e-6) and interval.high == pytest.approx(VOCAB, rel=1e-6)


def test_the_bootstrap_interval_matches_the_normal_one_for_a_mean():
    values = np.random.default_rng(0).normal(3, 2, size=2000)
    interval = bootstrap_ratio(values, np.ones(2000))
    half = 1.96 * values.std() / 2000**0.5
    # 10,000 resamples place a 2.5 % quantile within about 2.5 % of the half width (standard error 0.027 sigma).
    assert interval.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_pairing_removes_what_documents_share():
    random = np.random.default_rng(0)
    tokens = random.integers(50, 500, size=60)
    before = DocumentScores(("d",) * 60, tokens * random.normal(3, 1, size=60), tokens, 256, 0)
    after = DocumentScores(("d",) * 60, before.nll + 0.01 * tokens, tokens, 256, 0)
    change = paired_change(before, after)
    assert change.value == pytest.approx(0.01) and change.low == pytest.approx(0.01) and change.excludes_zero
    other = DocumentScores(("d",) * 60, after.nll, tokens, 128, 0)
    with pytest.raises(InputError, match="do not pair"):
        paired_change(before, other)


def test_equal_seeds_give_equal_intervals_and_one_unit_gives_none():
    values = np.arange(30.0)
    assert bootstrap_ratio(values, values + 1, seed=3) == bootstrap_ratio(values, values + 1, seed=3)
    single = bootstrap_ratio(values[:1], values[:1] + 1)
    assert (single.low, single.high) == (None, None) and not single.excludes_zero


def test_paired_items_need_equal_counts():
    assert paired_difference(np.zeros(4), np.ones(4)).value == 1
    with pytest.raises(InputError, match="4 items do not pair with 3"):
        paired_difference(np.zeros(4), np.zeros(3))


def test_the_report_entries_have_the_promised_keys():
    scores = evaluate_perplexity(bigram, documents(20, 21, 22, 23), window=8)
    total, by_domain = perplexity_report(scores, scores)
    assert set(total) >= {"before", "after", "change"} and set(total["change"]) == {"value", "low", "high"}
    assert total["change"]["value"] == 0 and set(by_domain) == {"even", "odd"}
    alone, _ = perplexity_report(None, scores)
    assert alone["before"] is None and alone["change"] is None
