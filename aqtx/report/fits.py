"""Curves through a cloud of points, each with its R^2: a line, a parabola, and LOESS (local lines, tricube weights)."""

from dataclasses import dataclass

import numpy as np

_GRID = 120  # places at which a curve is computed; LOESS between them is interpolated
_SPAN = 0.6  # share of the points that one local line sees


@dataclass(frozen=True)
class Fit:
    """A curve over its x range, and the share of the variance of y that it explains."""

    name: str
    x: np.ndarray
    y: np.ndarray
    r_squared: float


def all_fits(x: np.ndarray, y: np.ndarray) -> list[Fit]:
    """Linear, quadratic and LOESS; those for which there are too few different x are left out."""
    distinct = len(np.unique(x))
    fits = [_polynomial(x, y, degree) for degree in (1, 2) if distinct > degree + 1]
    if distinct >= 8:
        fits.append(_loess(x, y))
    return fits


def _polynomial(x: np.ndarray, y: np.ndarray, degree: int) -> Fit:
    curve = np.polynomial.Polynomial.fit(x, y, degree)
    grid = np.linspace(x.min(), x.max(), _GRID)
    return Fit(("linear", "quadratic")[degree - 1], grid, curve(grid), r_squared(y, curve(x)))


def _loess(x: np.ndarray, y: np.ndarray) -> Fit:
    # Local lines stand at quantiles of x, not at even steps: an outlier far out must not get half of the grid.
    grid = np.unique(np.quantile(x, np.linspace(0, 1, _GRID)))
    distance = np.abs(grid[:, None] - x[None, :])  # [grid, points]
    reach = np.partition(distance, int(_SPAN * (len(x) - 1)), axis=1)[:, int(_SPAN * (len(x) - 1)), None]
    weight = np.clip(1 - (distance / np.maximum(reach, 1e-12)) ** 3, 0, None) ** 3
    weight /= weight.sum(axis=1, keepdims=True)
    mean_x, mean_y = weight @ x, weight @ y
    centred = x[None, :] - mean_x[:, None]
    variance = (weight * centred**2).sum(axis=1)
    slope = (weight * centred * y[None, :]).sum(axis=1) / np.maximum(variance, 1e-12)
    curve = mean_y + slope * (grid - mean_x)
    return Fit("LOESS", grid, curve, r_squared(y, np.interp(x, grid, curve)))


def r_squared(y: np.ndarray, predicted: np.ndarray) -> float:
    """1 - residual / total variance; 0 where y does not vary."""
    total = float(((y - y.mean()) ** 2).sum())
    return 1 - float(((y - predicted) ** 2).sum()) / total if total > 0 else 0.0
