"""Alpha of the matrices as they are after rounding, by the same estimator as before: `alpha_after.csv`."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch

from aqtx.passes.annotate_alpha import AnnotateAlpha
from aqtx.program.program import Program
from aqtx.registry import Pass

COLUMNS = ("layer_name", "alpha_hill", "numel")


def write_alpha_after(program: Program, passes: Sequence[Pass], path: Path) -> None:
    """Write the table for every rounded site that has an alpha; without any, or without `annotate_alpha`, no file.

    One matrix is dequantized at a time. It costs what `annotate_alpha` costs.
    """
    steps = [step for step in passes if isinstance(step, AnnotateAlpha)]
    rows = [
        (site.name, alpha, site.numel)
        for site in {site.name: site for site in program.sites()}.values()
        if steps and site.get("alpha") is not None and site.name in program.codes
        for alpha in [_alpha(program, site.name, steps[-1])]
        if alpha is not None
    ]
    if not rows:
        return
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((name, f"{alpha:.6f}", numel) for name, alpha, numel in rows)
    path.write_text(stream.getvalue(), encoding="utf-8")


def _alpha(program: Program, name: str, step: AnnotateAlpha) -> float | None:
    stats = step.analyze(program.codes[name].dequantize(torch.float32).to(program.device))
    return float(stats.alpha[0]) if stats.reason[0] is None else None
