"""Held-out output error at few tokens, relative to round-to-nearest (= 1), on activation spectra i^-p.

512 inputs, INT4 g128. The figures for plain damping at p = 1 are those that anyone measures (0.904 at
16 tokens to 0.985 at 256 and 0.435 at 4096, within the scatter of a draw); the bounds are the promise.
"""

import pytest
import torch

from aqtx.formats import parse, quantize
from aqtx.numerics.gptq import Options, gptq, solve
from aqtx.numerics.shrinkage import pooled_prior, pseudo_tokens, shrink

K, N = 512, 256
FORMAT = "int4@amax"  # the rule of the published figures
COUNTS = (1, 16, 64, 128, 256, 512, 1024, 4096)


class Setting:
    """Weights and a source of tokens with spectrum i^-p."""

    def __init__(self, p: float, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.turn = torch.linalg.qr(torch.randn(K, K, generator=self.generator))[0]
        self.root = torch.arange(1, K + 1) ** (-p / 2)
        self.W = torch.randn(N, K, generator=self.generator) * 0.02
        self.held_out = self.moment(8192)
        self.nearest = self.error(quantize(self.W, FORMAT).dequantize())

    def moment(self, num_tokens: int) -> torch.Tensor:
        x = (torch.randn(num_tokens, K, generator=self.generator) * self.root) @ self.turn
        return x.T @ x

    def error(self, Q: torch.Tensor) -> float:
        D = Q - self.W
        return float(((D @ self.held_out) * D).sum())

    def ratio(self, num_tokens: int) -> float:
        Q = gptq(self.W, self.moment(num_tokens), FORMAT, order="activation", num_tokens=num_tokens)
        return self.error(Q.dequantize()) / self.nearest

    def ratio_once(self, num_tokens: int, *, shrunk: bool) -> float:
        """Of the algorithm as published: each column once, at the scales of the rule."""
        known = torch.tensor([float(num_tokens)]) if shrunk else None
        options = Options(order="activation", search_scales=False, sweeps=0)
        found = solve(self.W[None], self.moment(num_tokens)[None], parse(FORMAT), num_tokens=known, options=options)
        return self.error(found.tensor[0].dequantize()) / self.nearest


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5])
def test_never_more_than_two_percent_worse_than_nearest(p: float, seed: int) -> None:
    setting = Setting(p, seed)
    ratios = {count: setting.ratio(count) for count in COUNTS}
    assert {count: round(ratio, 3) for count, ratio in ratios.items() if ratio > 1.02} == {}


@pytest.mark.parametrize("seed", [0, 1])
def test_starved_experts_gain_most(seed: int) -> None:
    setting = Setting(1.0, seed)
    for count in (128, 256):
        plain, shrunk = (setting.ratio_once(count, shrunk=shrunk) for shrunk in (False, True))
        assert 0.85 < plain < 1.1  # so the setting is the known one
        assert shrunk < 0.7 * plain
    assert setting.ratio_once(4096, shrunk=True) < 0.46
    assert setting.ratio(4096) < 0.34


def test_no_tokens_is_round_to_nearest() -> None:
    setting = Setting(1.0)
    Q = gptq(setting.W, torch.zeros(K, K), "int4", num_tokens=0)
    assert torch.equal(Q.qdata, quantize(setting.W, "int4").qdata)


def test_pseudo_tokens_follow_the_spectrum() -> None:
    """The flatter, the more; and none of it is lost as tokens come in."""
    counts = torch.tensor([1024.0])
    found = []
    for p in (1.5, 1.0, 0.5, 0.0):
        H = Setting(p).moment(1024).unsqueeze(0)
        found.append(float(pseudo_tokens(H, counts, H.diagonal(dim1=1, dim2=2).mean(-1) / 1024)))
    assert found == sorted(found)
    # effective rank r = (sum lam)^2 / sum lam^2 = 28.1 at p = 1: c (1 + r) / (1 - r / K) = 2 * 29.1 / 0.945 = 62
    assert 45 < found[1] < 80


def test_pool_lends_what_an_expert_has_not_seen() -> None:
    setting = Setting(1.0)
    few, many = setting.moment(16), setting.moment(4000)
    prior = pooled_prior(many, torch.tensor(4000.0))
    tokens = torch.tensor(16.0)
    lent = gptq(setting.W, few, "int4", order="activation", num_tokens=tokens, prior=prior)
    own = gptq(setting.W, few, "int4", order="activation", num_tokens=tokens)
    assert setting.error(lent.dequantize()) < 0.75 * setting.error(own.dequantize())


def test_prior_of_the_right_shape_enters_as_stated() -> None:
    H, prior = Setting(1.0).moment(64).unsqueeze(0), torch.eye(K) * 3
    shrunk, n0 = shrink(H, torch.tensor([64.0]), prior)
    assert torch.allclose(shrunk[0], H[0] + n0 * prior)
