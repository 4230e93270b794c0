"""What became of the model: perplexity by domain, the router's shift, a study's Pareto front."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from aqtx.report.canvas import PALETTE, legend_below, panels
from aqtx.report.data import Absent, RunData
from aqtx.report.figures_maps import draw_grids
from aqtx.report.numbers import is_number

_MARKERS = ("o", "s", "^")


def domain_change(data: RunData) -> Figure:
    """Paired change of each domain in nats per token, with its interval."""
    domains = {"all": data.report.get("perplexity"), **(data.report.get("perplexity_by_domain") or {})}
    changes = {name: entry["change"] for name, entry in domains.items() if entry and entry.get("change")}
    if not changes:
        raise Absent("this run did not measure perplexity before and after.")
    figure, [axes] = panels(1, 1, height=0.9 + 0.35 * len(changes))
    for place, change in enumerate(changes.values()):
        value = change["value"]
        ends = [[value - _end(change, "low")], [_end(change, "high") - value]]
        axes.errorbar([value], [place], xerr=ends, fmt="o", color=PALETTE[0], capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(changes)), list(changes))
    axes.set_ylim(len(changes) - 0.5, -0.5)
    axes.set(xlabel="change in nats per token, after - before (95 % interval)")
    return figure


def _end(interval: dict[str, Any], key: str) -> float:
    end = interval.get(key)
    return float(end if is_number(end) else interval["value"])  # type: ignore[arg-type]


def trained(data: RunData) -> dict[str, Any]:
    """What the training pass of a run told; nothing where none ran."""
    return data.details("distill") or data.details("finetune_router")


def router_shift(data: RunData) -> Figure:
    """Share of tokens whose set of experts differs from the unquantized model's, per layer."""
    layers = trained(data).get("layers")
    if not layers:
        raise Absent("no router was trained in this run.")
    figure, [axes] = panels(1, 1)
    places = np.arange(len(layers))
    for offset, key, label in ((-0.2, "shift_before", "before training"), (0.2, "shift_after", "after")):
        axes.bar(places + offset, [100 * row[key] for row in layers], 0.4, label=label, color=PALETTE[offset > 0])
    axes.set_xticks(places, [str(row["layer"]) for row in layers])
    axes.set(xlabel="layer", ylabel="tokens with other experts, %")
    legend_below(axes)
    return figure


def finetune_curve(data: RunData) -> Figure:
    """Loss of training, on training batches and on held-out text."""
    curve = trained(data).get("curve")
    if not curve:
        raise Absent("nothing was trained in this run.")
    figure, [axes] = panels(1, 1)
    for index, key in enumerate(("training", "validation")):
        points = [(row["step"], row[key]) for row in curve if is_number(row.get(key))]
        axes.plot(*zip(*points, strict=True), "-o"[index:] if index else "-", color=PALETTE[index], label=key)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    legend_below(axes)
    return figure


def router_load(data: RunData) -> Figure:
    """Expert loads after training, in units of an even share."""
    layers = trained(data).get("layers")
    if not layers or not layers[0].get("load_after"):
        raise Absent("no router was trained in this run.")
    return draw_grids(
        {when: np.array([row[f"load_{when}"] for row in layers]) for when in ("before", "after")},
        "share of an even load",
        "cividis",
    )


def pareto(data: RunData) -> Figure:
    """Perplexity against bytes for every method of a study.

    Bars are the interval of the paired change: that of perplexity itself is as wide as the texts differ from each
    other, whatever the method. Methods at one size stand side by side; the seeds of a random one are averaged.
    """
    points = [row for row in data.study.get("points", []) if is_number(row.get("bytes"))]
    if not points:
        raise Absent("this folder holds no study (study.json).")
    figure, [axes] = panels(1, 1, height=4.8)
    before = points[0]["perplexity"]["value"] / math.exp(points[0]["change"]["value"])
    methods = list(dict.fromkeys(row["method"] for row in points))
    sizes = [row["bytes"] / 1e6 for row in points]
    span = max(max(sizes) - min(sizes), 0.02 * max(sizes))  # one budget alone is no range
    step = 0.12 * span / max(len(methods), 1)
    for index, method in enumerate(methods):
        curve = _curve([row for row in points if row["method"] == method])
        low, value, high = before * np.exp(curve[:, 1:].T)
        axes.errorbar(
            curve[:, 0] / 1e6 + (index - len(methods) / 2) * step,
            value,
            yerr=[value - low, high - value],
            fmt=f"{_MARKERS[index // len(PALETTE) % len(_MARKERS)]}-",
            color=PALETTE[index % len(PALETTE)],
            linewidth=1,
            markersize=4,
            label=method,
        )
    axes.axhline(before, color="black", linewidth=0.8, linestyle="--", label="unquantized")
    axes.set(xlabel="model size, MB", ylabel="perplexity (bars: 95 % of the paired change)")
    axes.set_xlim((min(sizes) + max(sizes) - 1.2 * span) / 2, (min(sizes) + max(sizes) + 1.2 * span) / 2)
    axes.ticklabel_format(axis="x", useOffset=False)
    legend_below(axes)
    return figure


def _curve(rows: list[dict[str, Any]]) -> np.ndarray:
    """Bytes and change (low, value, high) of one method at each budget, [budgets, 4]; means over seeds."""
    budgets: dict[Any, list[tuple[float, ...]]] = {}
    for row in rows:
        change = row["change"]
        found = (row["bytes"], _end(change, "low"), change["value"], _end(change, "high"))
        budgets.setdefault(row.get("budget_bits"), []).append(found)
    return np.array(sorted(np.mean(found, axis=0).tolist() for found in budgets.values()))
