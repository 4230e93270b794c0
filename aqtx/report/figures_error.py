"""Alpha against the measured error of each format, with fits, and what GPTQ gained on each matrix."""

import numpy as np
from matplotlib.figure import Figure

from aqtx.report.canvas import PALETTE, colour_of, legend_below, panels
from aqtx.report.data import Absent, RunData
from aqtx.report.fits import all_fits
from aqtx.report.numbers import is_number

_LINES = {"linear": "-", "quadratic": "--", "LOESS": ":"}


def alpha_against_error(data: RunData) -> Figure:
    """One panel per format: relative squared error over alpha, with linear, quadratic and LOESS fits."""
    clouds = error_clouds(data)
    columns = min(2, len(clouds))
    figure, axes = panels(-(-len(clouds) // columns), columns)
    for place, (name, points) in zip(axes, clouds.items(), strict=False):
        x, y = points[:, 0], np.log10(points[:, 1])
        place.scatter(x, y, s=6, color="#888888", alpha=0.5)
        for index, fit in enumerate(all_fits(x, y)):
            label = f"{fit.name}, R² = {fit.r_squared:.3f}"
            place.plot(fit.x, fit.y, _LINES[fit.name], color=PALETTE[index], linewidth=1.8, label=label)
        place.set(title=name, xlabel="alpha (Hill)", ylabel="log10 relative squared error")
        place.legend()
    for place in axes[len(clouds) :]:
        place.set_visible(False)
    return figure


def error_clouds(data: RunData) -> dict[str, np.ndarray]:
    """Format -> [points, 2] of alpha and error: of every format measured on a site, else of its chosen one."""
    clouds: dict[str, list[tuple[float, float]]] = {}
    for site in data.having("alpha"):
        errors = site.get("errors")
        if not isinstance(errors, dict):
            errors = {site.get("format"): site.get("error")}
        for name, error in errors.items():
            if name and is_number(error) and error > 0:
                clouds.setdefault(name, []).append((float(site["alpha"]), float(error)))
    if not clouds:
        raise Absent("no site of this run has both an alpha and a measured error.")
    return {name: np.array(points) for name, points in sorted(clouds.items())}


def gptq_gain(data: RunData) -> Figure:
    """Output error of GPTQ over that of round-to-nearest, against the tokens a matrix saw."""
    sites = [site for site in data.having("error_before", "error_after", "tokens") if site["error_before"] > 0]
    if not sites:
        raise Absent("this run has no GPTQ pass.")
    figure, [axes] = panels(1, 1)
    for index, name in enumerate(sorted({site["category"] for site in sites})):
        chosen = [site for site in sites if site["category"] == name]
        ratio = [site["error_after"] / site["error_before"] for site in chosen]
        axes.scatter([max(site["tokens"], 1) for site in chosen], ratio, s=10, color=colour_of(name, index), label=name)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlabel="calibration tokens", ylabel="error, GPTQ / round-to-nearest")
    legend_below(axes)
    return figure
