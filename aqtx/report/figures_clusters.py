"""Experts that are alike: k-means over what the run knows of each, its alpha, error and tokens."""

import numpy as np
from matplotlib.figure import Figure
from scipy.cluster.vq import kmeans2

from aqtx.report.canvas import PALETTE, legend_below, panels
from aqtx.report.data import Absent, RunData
from aqtx.report.numbers import is_number

FEATURES = ("alpha", "error", "tokens")
_CLUSTERS = 4
_STARTS = 16


def clusters(data: RunData) -> Figure:
    """The first two features of every expert, coloured by cluster; features are standardised before clustering."""
    names, table = expert_features(data)
    labels = assign_clusters(table)
    figure, [axes] = panels(1, 1, height=3.8)
    for label in np.unique(labels):
        chosen = table[labels == label]
        axes.scatter(
            chosen[:, 0], chosen[:, 1], s=16, color=PALETTE[label % len(PALETTE)], label=_describe(names, chosen)
        )
    axes.set(xlabel=f"{names[0]}, mean of the expert's matrices", ylabel=names[1])
    legend_below(axes)
    return figure


def expert_features(data: RunData) -> tuple[list[str], np.ndarray]:
    """Names and values [experts, features], means over an expert's matrices; only features that all experts have."""
    experts: dict[tuple[int, int], list[dict[str, float]]] = {}
    for site in data.sites.values():
        if site["expert"] is not None:
            experts.setdefault((site["layer"], site["expert"]), []).append(site)
    names = [key for key in FEATURES if experts and all(_has(sites, key) for sites in experts.values())]
    if len(names) < 2 or len(experts) <= _CLUSTERS:
        raise Absent("clusters of experts need two of alpha, error and calibration tokens on every expert.")
    rows = [[np.mean([s[key] for s in sites if is_number(s.get(key))]) for key in names] for sites in experts.values()]
    return names, np.array(rows)


def assign_clusters(table: np.ndarray) -> np.ndarray:
    """A cluster for each row; numbered by size, the largest first, so that equal data gives equal colours."""
    spread = table.std(axis=0)
    standard = (table - table.mean(axis=0)) / np.where(spread > 0, spread, 1)
    labels = min((_kmeans(standard, seed) for seed in range(_STARTS)), key=lambda found: found[0])[1]
    sizes = np.bincount(labels, minlength=_CLUSTERS)
    rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    found: np.ndarray = rank[labels]
    return found


def _kmeans(table: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """Summed squared distance to the centres, and labels, of one start: a single one may end in a poor place."""
    centres, labels = kmeans2(table, _CLUSTERS, minit="++", rng=np.random.default_rng(seed))
    return float(np.square(table - centres[labels]).sum()), labels


def _has(sites: list[dict[str, float]], key: str) -> bool:
    return any(is_number(site.get(key)) for site in sites)


def _describe(names: list[str], rows: np.ndarray) -> str:
    means = ", ".join(f"{name} {value:.3g}" for name, value in zip(names, rows.mean(axis=0), strict=True))
    return f"{len(rows)}: {means}"
