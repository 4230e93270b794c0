"""Alpha against plain references of the formulas, its invariances, and the published behaviour on noise."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.numerics.alpha import alpha_hill, analyze
from aqtx.numerics.spectrum import farms_blocks
from aqtx.numerics.tail import hill


def spiked(num_rows: int, num_columns: int, spikes: int, seed: int = 0) -> Tensor:
    """Noise plus a few strong directions, roughly what training leaves."""
    g = torch.Generator().manual_seed(seed)
    strong = torch.randn(num_rows, spikes, generator=g) @ torch.randn(spikes, num_columns, generator=g)
    return torch.randn(num_rows, num_columns, generator=g) + 0.3 * strong


def reference(W: Tensor, k_fraction: float = 0.1) -> float:
    """The Hill estimate written out with numpy, full spectrum."""
    lam = np.sort(np.linalg.svd(W.double().numpy(), compute_uv=False) ** 2)
    r = len(lam)
    k = min(max(max(10, math.floor(k_fraction * r)), 1), r - 1)
    return float(1 + k / sum(math.log(lam[r - i] / max(lam[r - k - 1], 1e-12)) for i in range(1, k + 1)))


def reference_farms(W: Tensor) -> float:
    """The pooled estimate written out block by block."""
    w = W.double().numpy()
    b = min(128, *w.shape)
    corners = [(i, j) for i in range(0, w.shape[0] - b + 1, b) for j in range(0, w.shape[1] - b + 1, b)]
    if len(corners) > 256:
        corners = [corners[i * len(corners) // 256] for i in range(256)]
    lam = np.sort(np.concatenate([np.linalg.svd(w[i : i + b, j : j + b], compute_uv=False) ** 2 for i, j in corners]))
    k = min(max(10, math.floor(0.1 * len(lam))), len(lam) - 1)
    return float(1 + k / np.log(lam[-k:] / max(lam[-k - 1], 1e-12)).sum())


SHAPES = [(64, 64), (96, 300), (300, 96), (256, 512), (5, 40), (2, 7), (16, 1024)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("precise", "tolerance"), [(True, 1e-6), (False, 1e-4)])
def test_equals_the_formula(shape: tuple[int, int], precise: bool, tolerance: float) -> None:
    for spikes in (0, 3):
        W = spiked(*shape, spikes)
        assert float(analyze(W, precise=precise).alpha[0]) == pytest.approx(reference(W), rel=tolerance)
        farms = analyze(W, spectra="farms", precise=precise).alpha[0]
        assert float(farms) == pytest.approx(reference_farms(W), rel=tolerance)


@pytest.mark.parametrize("strength", [1e-4, 1.0, 10.0, 3e3, 1e5])
def test_fast_path_survives_deep_tails(strength: float) -> None:
    """Low rank plus noise: where float32 Gram matrices fail, singular values take over."""
    g = torch.Generator().manual_seed(3)
    W = torch.randn(128, 256, generator=g)
    W += strength * torch.randn(128, 2, generator=g) @ torch.randn(2, 256, generator=g)
    fast, precise = analyze(W), analyze(W, precise=True)
    assert float(fast.alpha[0]) == pytest.approx(float(precise.alpha[0]), rel=1e-4)
    assert fast.method[0] == ("full/k_fraction/svd" if strength >= 3e3 else "full/k_fraction/gram")


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12, 1e25])
def test_scale_reaches_neither_overflow_nor_underflow(scale: float) -> None:
    W = spiked(64, 96, 2)
    lam = torch.linalg.svdvals((W * scale).double()).square().sort().values
    alpha = float(analyze(W * scale).alpha[0])
    assert math.isfinite(alpha)
    assert alpha == pytest.approx(hill(lam, 10), rel=1e-4) == pytest.approx(reference(W), rel=1e-4)


def test_invariances_of_the_full_spectrum() -> None:
    W = spiked(96, 160, 3).double()
    U, V = (torch.linalg.qr(spiked(n, n, 1, seed=n).double()).Q for n in (96, 160))
    expected = analyze(W, precise=True).alpha[0]
    for same in (W.T, 3.7 * W, U @ W @ V):
        torch.testing.assert_close(analyze(same, precise=True).alpha[0], expected, rtol=1e-6, atol=0)


def test_farms_keeps_scale_transpose_and_block_rotations_only() -> None:
    W = spiked(256, 384, 3).double()
    W[:, :40] *= 8  # outlier channels sit in one column of blocks until a full rotation spreads them
    U, V = torch.linalg.qr(spiked(128, 128, 1).double()).Q, torch.linalg.qr(spiked(384, 384, 1).double()).Q
    alpha = {"W": W, "T": W.T, "scaled": 0.1 * W, "blocks": torch.block_diag(U, U.T) @ W, "full": W @ V}
    found = {key: float(analyze(w, spectra="farms", precise=True).alpha[0]) for key, w in alpha.items()}
    assert found["T"] == pytest.approx(found["W"], rel=1e-6)
    assert found["scaled"] == pytest.approx(found["W"], rel=1e-6)
    assert found["blocks"] == pytest.approx(found["W"], rel=1e-6)
    assert abs(found["full"] - found["W"]) > 1e-2


def test_pareto_spectra_give_their_exponent() -> None:
    """E[alpha_hat] = 1 + (a - 1) k / (k - 1) with k = n / 10; the mean of 300 draws is known to sd / sqrt(300)."""
    rng = np.random.default_rng(0)
    for a, n in ((3.0, 1000), (2.0, 2000)):
        k = n // 10
        draws = [hill(torch.from_numpy(np.sort(1 + rng.pareto(a - 1, n))), k) for _ in range(300)]
        spread = (a - 1) / math.sqrt(k)
        assert np.mean(draws) == pytest.approx(1 + (a - 1) * k / (k - 1), abs=4 * spread / math.sqrt(300))
        assert np.std(draws) == pytest.approx(spread, rel=0.2)


def test_noise_has_the_published_shape_bias_and_farms_removes_it() -> None:
    """Gaussian matrices: 6.3-6.5 square, 8.05 at 1:2, 9.8 at 1:3.5 raw; 6.36-6.41 pooled, whatever the shape."""
    g = torch.Generator().manual_seed(0)
    square, wide, wider = (torch.randn(512, k, generator=g) for k in (512, 1024, 1792))
    pooled = [torch.randn(1024, k, generator=g) for k in (1024, 2048, 3584)]
    assert 6.2 < float(alpha_hill(square)) < 6.6
    assert float(alpha_hill(wide)) == pytest.approx(8.05, abs=0.25)
    assert float(alpha_hill(wider)) == pytest.approx(9.8, abs=0.3)
    for W in pooled:  # one draw of 64 to 224 blocks scatters by .05
        assert float(alpha_hill(W, spectra="farms")) == pytest.approx(6.385, abs=0.12)


def test_a_batch_is_its_matrices() -> None:
    stack = torch.stack([spiked(64, 96, n) for n in (1, 2, 3)])
    batch = alpha_hill(stack)
    assert isinstance(batch, Tensor) and batch.shape == (3,)
    assert batch.tolist() == [alpha_hill(w) for w in stack]


def test_bf16_weights_are_read_as_they_are() -> None:
    W = spiked(64, 96, 2).bfloat16()
    assert alpha_hill(W) == alpha_hill(W.float())


def test_blocks_beyond_the_limit_are_evenly_spaced() -> None:
    W = torch.arange(20 * 20).reshape(20, 20).float().repeat_interleave(2, 0).repeat_interleave(2, 1)
    corners = farms_blocks(W, side=2, max_blocks=100)[:, 0, 0]
    assert corners.tolist() == list(range(0, 400, 4))
    assert farms_blocks(torch.zeros(255, 300)).shape == (2, 128, 128)


def brute_ks(lam: np.ndarray) -> tuple[int, float]:
    """The tail of least Kolmogorov-Smirnov distance, tried one by one as WeightWatcher 0.7.7 does."""
    r, best = len(lam), (float("inf"), 0, 0.0)
    for i in range(r - 1):
        n = r - i
        alpha = 1 + n / (np.log(lam[i:]).sum() - n * np.log(lam[i]))
        distance = np.abs(1 - (lam[i:] / lam[i]) ** (1 - alpha) - np.arange(n) / n).max()
        best = min(best, (distance, n - 1, alpha))
    return best[1:]


def test_threshold_rules() -> None:
    W = spiked(120, 200, 5)
    lam = np.sort(np.linalg.svd(W.double().numpy(), compute_uv=False) ** 2)
    found = {rule: analyze(W, threshold=rule, precise=True).k_used[0] for rule in ("k_fraction", "xmin_mid", "ks")}
    assert found == {"k_fraction": 12, "xmin_mid": 60, "ks": brute_ks(lam)[0]}
    assert float(analyze(W, threshold="ks", precise=True).alpha[0]) == pytest.approx(brute_ks(lam)[1], rel=1e-9)
    peak_k = analyze(W, threshold="xmin_peak", precise=True).k_used[0]
    counts, edges = np.histogram(np.log10(lam), 100)
    left = 10 ** edges[counts.argmax()]
    assert 0.95 * left <= lam[-peak_k - 1] <= 1.5 * left
    assert analyze(W, threshold="ks", spectra="farms").alpha.isfinite().all()


def test_ks_finds_where_a_power_law_begins() -> None:
    """400 uniform values below 1 and 400 Pareto values above: the tail found is the Pareto part."""
    rng = np.random.default_rng(1)
    lam = np.sort(np.concatenate([rng.uniform(0.2, 1, 400), 1 + rng.pareto(1.5, 400)]))
    W = torch.diag(torch.from_numpy(np.sqrt(lam)))
    stats = analyze(W, threshold="ks", precise=True)
    assert 300 <= stats.k_used[0] <= 450
    assert float(stats.alpha[0]) == pytest.approx(2.5, abs=0.25)


@pytest.mark.parametrize(
    ("W", "reason"),
    [
        (torch.randn(1, 50), "fewer than two eigenvalues"),
        (torch.zeros(20, 30), "all weights are zero"),
        (torch.eye(32), "the largest eigenvalues are all equal"),
        (torch.full((20, 30), float("nan")), "the weights contain NaN or infinity"),
    ],
)
def test_degenerate_matrices_have_a_reason(W: Tensor, reason: str) -> None:
    for spectra in ("full", "farms"):
        stats = analyze(torch.stack([W, W]), spectra=spectra)
        assert stats.alpha.isnan().all()
        assert stats.reason == [reason, reason]


def test_rank_deficient_matrices_are_clamped_not_sorted_as_noise() -> None:
    """Rank 5 of 64: the threshold eigenvalue is zero and is taken for 1e-12."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(64, 5, generator=g) @ torch.randn(5, 64, generator=g)
    fast, precise = analyze(W), analyze(W, precise=True)
    assert fast.method == ["full/k_fraction/svd"]
    torch.testing.assert_close(fast.alpha, precise.alpha)


def test_options_are_checked_all_at_once() -> None:
    with pytest.raises(InputError) as caught:
        analyze(torch.randn(4, 4), spectra="ful", threshold="kss", k_fraction=1.5)
    assert [problem.split()[0] for problem in caught.value.problems] == ["spectra", "threshold", "k_fraction"]
    assert "did you mean 'full'" in caught.value.problems[0]
