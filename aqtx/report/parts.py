"""The sections of a run's page: which table and which figures each has, and what stands where data is missing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from aqtx.report import figures_alpha, figures_error, figures_outcome, gptq_table, html, sections, study_table
from aqtx.report.canvas import save_figure
from aqtx.report.data import Absent, RunData
from aqtx.report.figures_clusters import clusters
from aqtx.report.figures_maps import layer_map, utilisation

Draw = Callable[[RunData], Figure]


@dataclass(frozen=True)
class Part:
    """One section: its table, if any, and its figures (file stem -> drawing function and caption)."""

    anchor: str
    title: str
    table: Callable[[RunData], str] | None
    figures: dict[str, tuple[Draw, str]]


PARTS = (
    Part("summary", "Summary", sections.summary, {}),
    Part(
        "perplexity",
        "Perplexity",
        sections.perplexity,
        {"perplexity_change": (figures_outcome.domain_change, "Paired change by domain; right of zero is worse.")},
    ),
    Part("tasks", "Tasks", sections.tasks, {}),
    Part(
        "plan",
        "Plan",
        sections.plan,
        {"map_bits": (layer_map("bits", "bits per weight"), "Bits chosen; kept matrices are left out.")},
    ),
    Part(
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
    Part(
        "error",
        "Error",
        None,
        {
            "map_error": (layer_map("error", "relative squared error", cmap="magma"), "Error of the chosen format."),
            "alpha_error": (figures_error.alpha_against_error, "Does alpha predict the error of a format? R² says."),
        },
    ),
    Part(
        "gptq",
        "GPTQ and calibration",
        gptq_table.gptq,
        {
            "gptq_gain": (figures_error.gptq_gain, "Below one: better than round-to-nearest on the calibration text."),
            "map_tokens": (layer_map("tokens", "calibration tokens", cmap="cividis"), "Tokens that each matrix saw."),
            "map_shrinkage": (layer_map("shrinkage", "pseudo-tokens"), "Pseudo-tokens lent where tokens were few."),
            "map_error_before": (layer_map("error_before", "relative output error", cmap="magma"), "Round-to-nearest."),
            "map_error_after": (
                layer_map("error_after", "relative output error", cmap="magma"),
                "The same after GPTQ.",
            ),
            "clusters": (clusters, "Experts that are alike, with the size and the means of each cluster."),
            "map_utilisation": (utilisation, "Load of each expert; 1 is an even share."),
        },
    ),
    Part(
        "router",
        "Router",
        None,
        {
            "router_shift": (figures_outcome.router_shift, "Tokens whose experts differ from the unquantized model's."),
            "router_curve": (figures_outcome.finetune_curve, "Loss during training."),
            "router_load": (figures_outcome.router_load, "Expert loads before and after training."),
        },
    ),
    Part(
        "study", "Study", study_table.study, {"pareto": (figures_outcome.pareto, "Perplexity against size, by method.")}
    ),
    Part("passes", "Passes", sections.passes, {}),
    Part("settings", "Settings and versions", sections.settings, {}),
)


def build_part(part: Part, data: RunData, figures: Path) -> str:
    """HTML of one section of one run; its figures go to the folder `figures`."""
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
