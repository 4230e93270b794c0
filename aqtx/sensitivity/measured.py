"""The error of each format on each matrix, measured on the weights themselves.

Nominal bits say little: on Gaussian data MXFP6-E2M3 at 6.25 bits beats MXFP8-E4M3 at 8.25. Annotations: `error`
{format: ||W - Q(W)||^2 / ||W||^2} and `energy` ||W||^2.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.formats import Format, fake_quantize
from aqtx.numerics.error import energy, squared_error
from aqtx.program import Program, Site


def measure(program: Program, sites: Iterable[Site], formats: Sequence[Format]) -> None:
    """Annotate each site with its errors under the formats that it has no error of yet."""
    broken = []
    for site in sites:
        known: dict[str, float] = dict(site.get("error", {}))
        wanted = [fmt for fmt in formats if fmt.name not in known]
        if not wanted:
            continue
        W = program.read(site).to(program.device, program.dtype)
        if not bool(torch.isfinite(W).all()):
            broken.append(f"{site.name}: the weights contain NaN or infinity")
            continue
        signal = energy(W)
        for fmt in wanted:
            known[fmt.name] = squared_error(W, fake_quantize(W, fmt)) / max(signal, 1e-300)
        site.set("error", known)
        site.set("energy", signal)
    if broken:
        raise InputError(*broken)


def error_table(sites: Sequence[Site], formats: Sequence[Format]) -> Tensor:
    """Squared errors [sites, formats]; NaN where none was measured."""
    rows = [[site.get("error", {}).get(fmt.name, float("nan")) for fmt in formats] for site in sites]
    signal = torch.tensor([site.get("energy", 0.0) for site in sites], dtype=torch.float64)
    return torch.tensor(rows, dtype=torch.float64).reshape(len(sites), len(formats)) * signal[:, None]
