"""`alpha.csv`: one row per site, with the columns that readers of such tables know."""

import csv
import io
from pathlib import Path
from typing import Any

from torch import nn

from aqtx.program.program import Program, Site

COLUMNS = (
    *("layer_name", "alpha_hill", "category", "shape", "out_features", "in_features", "numel"),
    *("k_used", "n_eigs", "method"),
)


def alpha(source: str | Path | nn.Module, *, spectra: str = "farms", k_fraction: float = 0.1) -> dict[str, float]:
    """Alpha of every weight matrix of a model by site name; NaN where it is degenerate.

    Args:
        source: a folder, a shipped or hub name, or a module that maps ids to logits.
        spectra: "farms" or "full".
        k_fraction: share of the eigenvalues that form the tail.
    """
    from aqtx.passes.annotate_alpha import AnnotateAlpha
    from aqtx.program.trace import trace
    from aqtx.registry import Context

    program = trace(source)
    step = AnnotateAlpha(spectra=spectra, k_fraction=k_fraction, raw=False)  # type: ignore[arg-type]
    step.run(program, Context())
    return {site.name: float(site.get("alpha", float("nan"))) for site in program.sites()}


def alpha_rows(program: Program) -> list[dict[str, Any]]:
    """The rows of the annotated sites; a degenerate site has an empty alpha and its reason under `method`."""
    sites = {site.name: site for site in program.sites() if site.get("alpha_info") is not None}
    return [_row(site) for site in sites.values()]


def _row(site: Site) -> dict[str, Any]:
    info, found = site.get("alpha_info"), site.get("alpha")
    num_rows, num_columns = site.shape
    return {
        "layer_name": site.name,
        "alpha_hill": "" if found is None else f"{found:.6f}",
        "category": site.category,
        "shape": f"{num_rows}x{num_columns}",
        "out_features": num_rows,
        "in_features": num_columns,
        "numel": site.numel,
        "k_used": info["k_used"],
        "n_eigs": info["n_eigs"],
        "method": info["method"] if info["reason"] is None else f"degenerate: {info['reason']}",
    }


def alpha_csv(program: Program) -> str:
    """The table as text, sites in the model's order."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(alpha_rows(program))
    return stream.getvalue()


def write_alpha_csv(program: Program, path: Path) -> None:
    """Write the table where there is one: a program without alphas gets no file."""
    if alpha_rows(program):
        path.write_text(alpha_csv(program), encoding="utf-8")
