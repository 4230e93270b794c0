"""How figures look: one style, one palette, no global matplotlib state, PNG files that differ only when data does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers too.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F", "#B8A900", "#000000")
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "image.cmap": "viridis",
    "text.parse_math": False,  # a name with $ in it is a name, not a formula
}
_WIDTH = 7.2
_CATEGORIES = (
    "mlp_gate", "mlp_up", "mlp_down", "attn_q", "attn_k", "attn_v", "attn_o", "router", "lm_head",
)  # fmt: skip


def colour_of(name: str, index: int = 0) -> str:
    """A category's own colour in every figure; other names take the palette in order."""
    place = _CATEGORIES.index(name) if name in _CATEGORIES else index
    return PALETTE[place % len(PALETTE)]


def panels(rows: int, columns: int, *, height: float = 3.2, share: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns axes, `height` inches each row."""
    figure = Figure(figsize=(_WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    return figure, list(axes.ravel())


def heat_map(axes: Axes, grid: np.ndarray, *, limits: tuple[float, float] | None = None, cmap: str = "viridis") -> Any:
    """Layers down, columns across; cells without a value stay grey."""
    axes.set_facecolor("#d0d0d0")
    axes.grid(False)
    low, high = limits or (float(np.nanmin(grid)), float(np.nanmax(grid)))
    if high - low <= 1e-9 * abs(high):  # all equal but for rounding: one colour, not the ends of the scale
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", vmin=low, vmax=high, cmap=cmap)
    for axis, count in ((axes.yaxis, grid.shape[0]), (axes.xaxis, grid.shape[1])):
        axis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=min(5, count), integer=True))
    return image


def save_figure(draw: Callable[[], Figure], path: Path) -> None:
    """Draw in the report's style and write a PNG without date or version, so that equal data gives equal bytes."""
    with matplotlib.rc_context(STYLE):
        figure = draw()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Software": None})


def legend_below(axes: Axes, entries: Mapping[str, Any] | None = None) -> None:
    """A legend under the axes, where it hides no data."""
    labels = list(entries or axes.get_legend_handles_labels()[1])
    columns = 2 if any(len(label) > 20 for label in labels) else min(5, max(1, len(labels)))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=columns)
