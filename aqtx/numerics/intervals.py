"""How sure a number is: percentile bootstrap over documents or items, seeded and vectorised.

A document is the unit that is drawn, since tokens of one document are not independent. A resample of D documents is a
vector of D counts, so 10,000 resamples are one [10000, D] matrix times the sums, done in slices.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

from aqtx.errors import InputError

RESAMPLES = 10_000
RANK_RESAMPLES = 2_000


LEVEL = 0.95


_SLICE_ELEMENTS = 4_000_000  # 32 MB of float64 counts at a time


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % interval; with a single unit to draw from there are none (None)."""

    value: float
    low: float | None
    high: float | None

    def to_json(self) -> dict[str, float | None]:
        """{"value", "low", "high"}."""
        return asdict(self)

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def bootstrap_ratio(
    numerator: np.ndarray,
    denominator: np.ndarray,
    *,
    seed: int = 0,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Interval:
    """Interval of transform(sum of numerators / sum of denominators) over resampled units."""
    sums = np.stack([numerator, denominator], axis=1).astype(np.float64)  # [D, 2]
    apply = transform or (lambda ratio: ratio)
    total = sums.sum(axis=0)
    value = float(apply(np.asarray(total[0] / total[1])))
    if len(sums) < 2:
        return Interval(value, None, None)
    draws = _resampled(sums, np.random.default_rng(seed))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(apply(draws[:, 0] / draws[:, 1]), [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _resampled(sums: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Sums [RESAMPLES, 2] over units drawn with replacement."""
    num_units = len(sums)
    step = max(1, _SLICE_ELEMENTS // num_units)
    slices = []
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn = random.integers(0, num_units, size=(rows, num_units)) + np.arange(rows)[:, None] * num_units
        counts = np.bincount(drawn.ravel(), minlength=rows * num_units).reshape(rows, num_units)
        slices.append(counts.astype(np.float64) @ sums)
    return np.concatenate(slices)


def paired_difference(before: np.ndarray, after: np.ndarray, *, seed: int = 0) -> Interval:
    """Mean of after minus before over items that pair one to one (task accuracies)."""
    if before.shape != after.shape:
        raise InputError(f"{len(before)} items do not pair with {len(after)}")
    return bootstrap_ratio(after - before, np.ones(len(before)), seed=seed)


def rank_correlation(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> Interval:
    """Spearman's correlation of paired values [n], with its interval over resampled pairs.

    Raises:
        InputError: there are fewer than three pairs, or one side is constant.
    """
    if len(x) < 3 or len(set(x.tolist())) == 1 or len(set(y.tolist())) == 1:
        raise InputError(f"{len(x)} pairs of values cannot be ranked: three or more that differ are needed")
    value = float(_spearman(x[None], y[None])[0])
    random, found = np.random.default_rng(seed), []
    step = max(1, _SLICE_ELEMENTS // len(x))
    for start in range(0, RANK_RESAMPLES, step):
        drawn = random.integers(0, len(x), size=(min(step, RANK_RESAMPLES - start), len(x)))
        found.append(_spearman(x[drawn], y[drawn]))
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of each row of [R, n]; equal values share their mean rank; NaN where a row is constant."""
    from scipy.stats import rankdata  # a tenth of a second to import, for one kind of interval

    ranks = [rankdata(side, axis=1) - (x.shape[1] + 1) / 2 for side in (x, y)]
    norm = np.sqrt(np.square(ranks[0]).sum(1) * np.square(ranks[1]).sum(1))
    return np.divide((ranks[0] * ranks[1]).sum(1), norm, out=np.full(len(x), np.nan), where=norm > 0)


def clearly_less(losses: Tensor, than: Tensor) -> bool:
    """Whether paired losses of sequences [n] are lower in the mean, beyond twice the standard error."""
    gain = than - losses
    return len(gain) > 1 and float(gain.mean()) > 2 * float(gain.std()) / math.sqrt(len(gain))
