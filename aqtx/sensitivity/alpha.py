"""Alpha of weight matrices: measured, scored against each other, and told as tables.

Alpha (PL_Alpha_Hill) is the exponent of the heavy tail of a matrix's spectrum, see `aqtx.numerics.alpha`. Scores are
robust z-values: where a value stands among the others, whatever their scale and outliers.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aqtx.checkpoint.open import trace
from aqtx.errors import InputError
from aqtx.numerics.alpha import AlphaStats, analyze
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Refusal

COLUMNS = (
    *("layer_name", "alpha_hill", "category", "shape", "out_features", "in_features", "numel"),
    *("k_used", "n_eigs", "method"),
)
MAD_TO_SIGMA = 1.4826  # of a normal distribution
CLIP = 3.0


@dataclass(frozen=True, kw_only=True)
class AlphaOptions:
    """How alpha is estimated: the keys of `annotate_alpha`."""

    spectra: str = "farms"
    k_fraction: float = 0.1
    threshold: str = "k_fraction"
    precise: bool = False
    raw: bool = True

    def analyze(self, W: Any, spectra: str | None = None) -> AlphaStats:
        """Alpha of one matrix [N, K]."""
        return analyze(
            W,
            k_fraction=self.k_fraction,
            spectra=spectra or self.spectra,
            threshold=self.threshold,
            precise=self.precise,
        )


def measure_alpha(program: Program, sites: Sequence[Site], options: AlphaOptions, context: Context) -> Changes:
    """Annotate sites with `alpha` and `alpha_info`; one matrix is in memory at a time, ranks share the work.

    Raises:
        InputError: names every matrix that holds NaN or infinity.
    """
    broken: list[str] = []

    def measure(site: Site) -> tuple[AlphaStats, AlphaStats]:
        W = program.read(site).to(context.device)
        stats = options.analyze(W)
        return stats, options.analyze(W, "full") if options.raw and options.spectra != "full" else stats

    found = context.ranks.share(measure, sites, progress=partial(context.progress, description="annotate_alpha"))
    changes = Changes()
    for site, (stats, raw) in zip(sites, found, strict=True):
        reason = stats.reason[0]
        if stats.method[0].endswith("/none") and reason is not None and "NaN" in reason:
            broken.append(f"{site.name}: {reason}")
            continue
        _annotate(site, stats, raw)
        if reason is None:
            changes.changed.append(site.name)
        else:
            changes.refused.append(Refusal(site.name, f"its alpha is degenerate: {reason}"))
    if broken:
        raise InputError(*broken)
    changes.details["sites"] = [{"site": site.name, "alpha_raw": site.get("alpha_info")["raw"]} for site in sites]
    return changes


def _annotate(site: Site, stats: AlphaStats, raw: AlphaStats) -> None:
    site.set("alpha", float(stats.alpha[0]) if stats.reason[0] is None else None)
    info = {"k_used": stats.k_used[0], "n_eigs": stats.num_eigenvalues[0], "method": stats.method[0]}
    raw_alpha = float(raw.alpha[0]) if raw.reason[0] is None else None
    site.set("alpha_info", {**info, "reason": stats.reason[0], "raw": raw_alpha})


def alpha(source: str | Path | nn.Module, *, spectra: str = "farms", k_fraction: float = 0.1) -> dict[str, float]:
    """Alpha of every weight matrix of a model by site name; NaN where it is degenerate.

    Args:
        source: a folder, a shipped or hub name, or a module that maps ids to logits.
        spectra: "farms" or "full".
        k_fraction: share of the eigenvalues that form the tail.
    """
    program = trace(source)
    options = AlphaOptions(spectra=spectra, k_fraction=k_fraction, raw=False)
    measure_alpha(program, list({site.name: site for site in program.sites()}.values()), options, Context())
    return {site.name: float(site.get("alpha", float("nan"))) for site in program.sites()}


def robust_z(values: Tensor) -> Tensor:
    """(x - median) / (1.4826 MAD), clipped to +-3; zero where the spread is zero."""
    if not values.numel():
        return values
    centred = values - median(values)
    spread = MAD_TO_SIGMA * median(centred.abs())
    return (centred / spread).clamp(-CLIP, CLIP) if float(spread) > 0 else torch.zeros_like(values)


def median(values: Tensor) -> Tensor:
    """Between the two middle values of an even count; torch's own median takes the lower one."""
    ordered = values.sort().values
    middle = len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def alpha_scores(sites: Sequence[Site], normalize: str) -> Tensor:
    """z-scores of ln alpha over `all` sites, or within each `category`."""
    logs = torch.tensor([site.get("alpha") for site in sites], dtype=torch.float64).log()
    if normalize == "all":
        return robust_z(logs)
    scores = torch.zeros_like(logs)
    for category in dict.fromkeys(site.category for site in sites):
        rows = torch.tensor([site.category == category for site in sites])
        scores[rows] = robust_z(logs[rows])
    return scores


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
    """The table as text, sites in the model's order; empty where no site is annotated."""
    rows = alpha_rows(program)
    return _csv(COLUMNS, [list(row.values()) for row in rows]) if rows else ""


def alpha_after_csv(program: Program, options: AlphaOptions) -> str:
    """A table of alpha as the rounded matrices have it, by the estimator of before; empty where there is nothing.

    One matrix is dequantized at a time. It costs what `measure_alpha` costs.
    """
    rows = []
    for site in {site.name: site for site in program.sites()}.values():
        if site.get("alpha") is not None and site.name in program.codes:
            stats = options.analyze(program.codes[site.name].dequantize(torch.float32).to(program.device))
            if stats.reason[0] is None:
                rows.append([site.name, f"{float(stats.alpha[0]):.6f}", site.numel])
    return _csv(("layer_name", "alpha_hill", "numel"), rows) if rows else ""


def _csv(columns: Sequence[str], rows: list[list[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue()
