"""Alpha fitted to a model: its sign, its threshold rule and its strength, per role, against something measured.

The measured loss of rounding a matrix, divided by its squared error, says how sensitive it is per unit of
error. Its logarithm t is regressed on the z-score of ln alpha within each role (gate, up, down, ...): t = a + b
z. A slope is kept only where it predicts left-out matrices clearly better than the role's mean does; without
one, matrices of a role differ by their errors alone. Of several variants of alpha the one that predicts best is
taken. What is measured is either the Fisher information of all matrices on a few sequences, or the divergence
of the predictions when one of a sample of matrices is rounded.

Legend: z, t [n] of one role; SSE sum of squared leave-one-out errors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aqtx.numerics.alpha import analyze
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.sensitivity.alpha import robust_z

VARIANTS = (("farms", "k_fraction"), ("farms", "xmin_mid"), ("full", "k_fraction"), ("full", "xmin_mid"))
MIN_POINTS = 5  # a role with fewer measurements has no slope
MIN_GAIN = 0.1  # nor has one where alpha predicts less than this share of the variance: weaker slopes are noise


@dataclass(frozen=True)
class Line:
    """One role's fit t = a + b z, and how well it and the mean alone predict what was left out."""

    intercept: float
    slope: float
    error: float  # SSE of the line that is used
    baseline: float  # SSE of the mean


@dataclass(frozen=True)
class Fit:
    """The best variant's lines by role."""

    variant: tuple[str, str]
    lines: dict[str, Line]
    num_points: int

    @property
    def explained(self) -> float:
        """The share of the variance within roles that alpha predicts for matrices left out of the fit."""
        baseline = sum(line.baseline for line in self.lines.values())
        return 1 - sum(line.error for line in self.lines.values()) / baseline if baseline > 0 else 0.0

    def sentence(self) -> str:
        """Whether alpha can be trusted on this model."""
        slopes = {role: line.slope for role, line in self.lines.items()}
        if self.explained < 0.05 or not any(slopes.values()):
            return (
                f"Alpha cannot be trusted on this model: within roles it predicts {100 * self.explained:.0f} % of the "
                f"measured sensitivity ({self.num_points} matrices)."
            )
        words = ", ".join(
            f"{role} {'low' if slope < 0 else 'high'} alpha = sensitive" for role, slope in slopes.items() if slope
        )
        return (
            f"Alpha ({'/'.join(self.variant)}) predicts {100 * self.explained:.0f} % of the measured sensitivity "
            f"within roles ({self.num_points} matrices): {words}."
        )

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        lines = {role: {"intercept": line.intercept, "slope": line.slope} for role, line in self.lines.items()}
        facts = {"variant": "/".join(self.variant), "explained": self.explained, "points": self.num_points}
        return {**facts, "roles": lines, "sentence": self.sentence()}


def fit_line(z: Tensor, t: Tensor) -> Line:
    """Least squares with the slope only where it pays on left-out points."""
    n, mean = len(t), float(t.mean())
    # leaving point i out moves a mean by a factor n / (n - 1) of the residual
    baseline = float(((t - mean) * n / max(n - 1, 1)).square().sum())
    centred = z - z.mean()
    spread = float(centred.square().sum())
    if n < MIN_POINTS or spread <= 0:
        return Line(mean, 0.0, baseline, baseline)
    slope = float((centred * t).sum()) / spread
    leverage = 1 / n + centred.square() / spread
    residual = (t - mean - slope * centred) / (1 - leverage).clamp_min(1e-6)
    error = float(residual.square().sum())
    if error >= (1 - MIN_GAIN) * baseline:
        return Line(mean, 0.0, baseline, baseline)
    return Line(mean - slope * float(z.mean()), slope, error, baseline)


def fit(scores: dict[tuple[str, str], Tensor], targets: Tensor, roles: Sequence[str]) -> Fit:
    """The variant that predicts best. `scores` [L] z by variant, `targets` [L] with NaN where nothing was measured."""
    fits = []
    for variant, z in scores.items():
        lines = {}
        for role in dict.fromkeys(roles):
            rows = torch.tensor([name == role for name in roles]) & targets.isfinite()
            if bool(rows.any()):
                lines[role] = fit_line(z[rows], targets[rows])
        fits.append(Fit(variant, lines, int(targets.isfinite().sum())))
    return min(fits, key=lambda found: sum(line.error for line in found.lines.values()))


def alpha_variants(program: Program, sites: Sequence[Site]) -> dict[tuple[str, str], Tensor]:
    """z-scores of ln alpha within each role, by variant; 0 where a matrix is degenerate."""
    found = {}
    for spectra, threshold in VARIANTS:
        alphas = torch.cat(
            [
                analyze(program.weights.matrix(s.weight, s.expert), spectra=spectra, threshold=threshold).alpha
                for s in sites
            ]
        )
        z = torch.zeros_like(alphas)
        for role in dict.fromkeys(site.category for site in sites):
            rows = torch.tensor([site.category == role for site in sites]) & alphas.isfinite()
            z[rows] = robust_z(alphas[rows].log())
        found[(spectra, threshold)] = z
    return found


def annotate_fit(found: Fit, z: Tensor, sites: Sequence[Site]) -> None:
    """Annotate `calibrated`: the logarithm of each site's sensitivity per unit of squared error."""
    overall = sum(line.intercept for line in found.lines.values()) / max(len(found.lines), 1)
    for site, score in zip(sites, z.tolist(), strict=True):
        line = found.lines.get(site.category)
        site.set("calibrated", overall if line is None else line.intercept + line.slope * score)


def log_ratio(loss: float, error: float) -> float:
    """ln(loss / error), NaN where either says nothing."""
    return math.log(loss / error) if loss > 0 and error > 0 else float("nan")
