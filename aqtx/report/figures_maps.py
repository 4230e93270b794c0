"""Maps over layer x expert, one panel per projection, and one over layer x attention matrix where those have values."""

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from aqtx.report.canvas import heat_map, panels
from aqtx.report.data import ATTENTION, Absent, RunData


def layer_map(key: str, label: str, *, cmap: str = "viridis") -> Callable[[RunData], Figure]:
    """A drawing function for one column of the sites; all panels share one colour scale."""

    def draw(data: RunData) -> Figure:
        grids = {name: data.expert_grid(key, name) for name in data.projections}
        grids["attention"] = data.attention_grid(key)
        return draw_grids({name: grid for name, grid in grids.items() if grid.size}, label, cmap)

    return draw


def draw_grids(grids: dict[str, np.ndarray], label: str, cmap: str = "viridis") -> Figure:
    """Panels of grids under one colour bar."""
    if not grids:
        raise Absent(f"no site of this run has a value for {label}.")
    layers = max(grid.shape[0] for grid in grids.values())
    figure, axes = panels(1, len(grids), height=min(9.0, 1.6 + 0.22 * layers))
    values = np.concatenate([grid.ravel() for grid in grids.values()])
    limits = (float(np.nanmin(values)), float(np.nanmax(values)))
    for place, (name, grid) in zip(axes, grids.items(), strict=True):
        image = heat_map(place, grid, limits=limits, cmap=cmap)
        place.set(title=name, xlabel="expert")
        if name == "attention":
            place.set_xticks(range(len(ATTENTION)), [word[0] for word in ATTENTION])
            place.set_xlabel("")
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    return figure


def utilisation(data: RunData) -> Figure:
    """Tokens that reached each expert, in units of an even share, per layer."""
    projection = next(iter(data.projections), "")
    tokens = data.expert_grid("tokens", projection)
    if not tokens.size:
        raise Absent("no pass of this run counted the tokens of each expert.")
    even = np.nanmean(tokens, axis=1, keepdims=True)
    return draw_grids({"calibration tokens": tokens / np.maximum(even, 1e-9)}, "share of an even load", "cividis")
