"""A run directory -> report.html and figures/*.png, from the data in the directory alone."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from aqtx.report import figures_alpha, figures_error, figures_outcome, gptq_table, html, sections
from aqtx.report.canvas import save_figure
from aqtx.report.data import Absent, RunData, read_run
from aqtx.report.figures_maps import layer_map, utilisation

Draw = Callable[[RunData], Figure]


@dataclass(frozen=True)
class _Part:
    """One section: its table, if any, and its figures (file stem -> drawing function and caption)."""

    anchor: str
    title: str
    table: Callable[[RunData], str] | None
    figures: dict[str, tuple[Draw, str]]


PARTS = (
    _Part("summary", "Summary", sections.summary, {}),
    _Part(
        "perplexity",
        "Perplexity",
        sections.perplexity,
        {"perplexity_change": (figures_outcome.domain_change, "Paired change by domain; right of zero is worse.")},
    ),
    _Part("tasks", "Tasks", sections.tasks, {}),
    _Part(
        "plan",
        "Plan",
        sections.plan,
        {"map_bits": (layer_map("bits", "bits per weight"), "Bits chosen; kept matrices are left out.")},
    ),
    _Part(
        "alpha",
        "Alpha",
        None,
        {
            "alpha_histogram": (figures_alpha.histogram, "Alpha of all matrices, by category."),
            "alpha_sorted": (figures_alpha.sorted_curve, "The same, sorted."),
            "alpha_boxes": (figures_alpha.boxes, "Quartiles per category, with the number of matrices."),
            "alpha_cdf": (figures_alpha.cumulative, "Share of matrices at or below each alpha."),
            "map_alpha": (layer_map("alpha", "alpha"), "Alpha over layer and expert."),
            "alpha_before_after": (figures_alpha.before_after, "Alpha before and after quantization."),
        },
    ),
    _Part(
        "error",
        "Error",
        None,
        {
            "map_error": (layer_map("error", "relative squared error", cmap="magma"), "Error of the chosen format."),
            "alpha_error": (figures_error.alpha_against_error, "Does alpha predict the error of a format? R² says."),
        },
    ),
    _Part(
        "gptq",
        "GPTQ and calibration",
        gptq_table.gptq,
        {
            "gptq_gain": (figures_error.gptq_gain, "Below one: better than round-to-nearest on the calibration text."),
            "map_tokens": (layer_map("tokens", "calibration tokens", cmap="cividis"), "Tokens that each matrix saw."),
            "map_utilisation": (utilisation, "Load of each expert; 1 is an even share."),
        },
    ),
    _Part(
        "router",
        "Router",
        None,
        {
            "router_shift": (figures_outcome.router_shift, "Tokens whose experts differ from the unquantized model's."),
            "router_curve": (figures_outcome.finetune_curve, "Loss during router finetuning."),
            "router_load": (figures_outcome.router_load, "Expert loads before and after router finetuning."),
        },
    ),
    _Part("study", "Study", None, {"pareto": (figures_outcome.pareto, "Perplexity against size, by method.")}),
    _Part("passes", "Passes", sections.passes, {}),
    _Part("settings", "Settings and versions", sections.settings, {}),
)


def write_report(directory: str | Path) -> Path:
    """Build `report.html` and `figures/` in a run directory from the data it holds; returns the page's path.

    A piece of data that is missing leaves a sentence in its place. Figures of an earlier build are removed first.
    """
    data = read_run(Path(directory))
    figures = data.directory / "figures"
    shutil.rmtree(figures, ignore_errors=True)
    built = [html.Section(part.anchor, part.title, _build(part, data, figures)) for part in PARTS]
    path = data.directory / "report.html"
    path.write_text(html.page(data.name, _subtitle(data), built), encoding="utf-8")
    return path


def _build(part: _Part, data: RunData, figures: Path) -> str:
    pieces, reasons = [], []
    if part.table is not None:
        try:
            pieces.append(part.table(data))
        except Absent as reason:
            reasons.append(str(reason))
    for stem, (draw, caption) in part.figures.items():
        path = figures / f"{stem}.png"
        try:
            save_figure(lambda draw=draw: draw(data), path)  # type: ignore[misc]
            pieces.append(html.figure(path, caption))
        except Absent as reason:
            reasons.append(str(reason))
    return "".join(pieces) + "".join(html.absent(_sentence(reason)) for reason in dict.fromkeys(reasons))


def _sentence(reason: str) -> str:
    return reason[:1].upper() + reason[1:]


def _subtitle(data: RunData) -> str:
    settings = data.report.get("settings") or {}
    source = (settings.get("model") or {}).get("source")
    steps = [row["name"] for row in data.report.get("passes", [])]
    return " · ".join(word for word in (f"model {source}" if source else "", " → ".join(steps)) if word)
