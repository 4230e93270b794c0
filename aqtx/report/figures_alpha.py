"""How alpha is distributed: histogram, sorted curve, boxes, cumulative share, and before against after quantization."""

import numpy as np
from matplotlib.figure import Figure

from aqtx.report.canvas import colour_of, legend_below, panels
from aqtx.report.data import Absent, RunData


def histogram(data: RunData) -> Figure:
    """Stacked histogram of alpha, one colour per category."""
    groups = data.by_category("alpha")
    figure, [axes] = panels(1, 1)
    everything = np.concatenate(list(groups.values()))
    bins = np.histogram_bin_edges(everything, bins=min(60, max(10, int(len(everything) ** 0.5))))
    colours = [colour_of(name, index) for index, name in enumerate(groups)]
    axes.hist(list(groups.values()), bins=list(bins), stacked=True, color=colours, label=list(groups))
    axes.axvline(float(np.median(everything)), color="black", linewidth=1, linestyle="--", label="median")
    axes.set(xlabel="alpha (Hill)", ylabel="matrices")
    legend_below(axes)
    return figure


def sorted_curve(data: RunData) -> Figure:
    """All matrices from the lowest alpha to the highest."""
    groups = data.by_category("alpha")
    values = np.concatenate(list(groups.values()))
    names = np.concatenate([[name] * len(group) for name, group in groups.items()])
    order = np.argsort(values, kind="stable")
    figure, [axes] = panels(1, 1)
    rank = np.arange(len(values))
    for index, name in enumerate(groups):
        chosen = names[order] == name
        axes.scatter(rank[chosen], values[order][chosen], s=8, color=colour_of(name, index), label=name)
    axes.set(xlabel="matrices, sorted", ylabel="alpha (Hill)")
    legend_below(axes)
    return figure


def boxes(data: RunData) -> Figure:
    """Quartiles and outliers of alpha per category."""
    groups = data.by_category("alpha")
    figure, [axes] = panels(1, 1)
    drawn = axes.boxplot(list(groups.values()), patch_artist=True, medianprops={"color": "black"}, widths=0.6)
    for index, (name, box) in enumerate(zip(groups, drawn["boxes"], strict=True)):
        box.set(facecolor=colour_of(name, index), alpha=0.7)
    axes.set_xticks(range(1, len(groups) + 1), [f"{name}\n{len(group)}" for name, group in groups.items()])
    axes.set(ylabel="alpha (Hill)")
    return figure


def cumulative(data: RunData) -> Figure:
    """Share of the matrices at or below each alpha."""
    groups = data.by_category("alpha")
    figure, [axes] = panels(1, 1)
    for index, (name, group) in enumerate(groups.items()):
        axes.ecdf(group, color=colour_of(name, index), label=name)
    axes.ecdf(np.concatenate(list(groups.values())), color="black", linewidth=2, label="all")
    axes.set(xlabel="alpha (Hill)", ylabel="share of matrices")
    legend_below(axes)
    return figure


def before_after(data: RunData) -> Figure:
    """Alpha of each matrix before quantization against the same matrix after it."""
    sites = data.having("alpha", "alpha_after")
    if not sites:
        raise Absent("alpha was not taken again after quantization: alpha_after.csv is not in this folder.")
    figure, [axes] = panels(1, 1, height=4.2)
    for index, name in enumerate(sorted({site["category"] for site in sites})):
        points = np.array([(s["alpha"], s["alpha_after"]) for s in sites if s["category"] == name])
        axes.scatter(points[:, 0], points[:, 1], s=10, color=colour_of(name, index), label=name)
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="black", linewidth=0.8, linestyle="--", label="unchanged")
    axes.set(xlabel="alpha before", ylabel="alpha after")
    legend_below(axes)
    return figure
