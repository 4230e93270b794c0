"""The error of each format on each matrix, measured on the weights themselves.

Nominal bits say little: on Gaussian data MXFP6-E2M3 at 6.25 bits beats MXFP8-E4M3 at 8.25. Annotations: `error`
{format: ||W - Q(W)||^2 / ||W||^2} and `energy` ||W||^2.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.formats import Format, fake_quantize
from aqtx.numerics.error import energy, squared_error
from aqtx.program.program import Program
from aqtx.program.site import Site

Request = tuple[Site, Sequence[Format]]  # a site, and the formats that it may take


def requests(sites: Iterable[Site], formats: Sequence[Format]) -> list[Request]:
    """The same formats for all sites."""
    return [(site, formats) for site in sites]


def smallest(wanted: Sequence[Request]) -> list[Request]:
    """The same sites with the first of their formats only."""
    return [(site, formats[:1]) for site, formats in wanted]


def measure(program: Program, wanted: Iterable[Request]) -> None:
    """Annotate each site with its errors under the formats that it has no error of yet."""
    broken = []
    for site, formats in wanted:
        known: dict[str, float] = dict(site.get("error", {}))
        missing = [fmt for fmt in formats if fmt.name not in known]
        if not missing:
            continue
        W = matrix(program, site)
        if not bool(torch.isfinite(W).all()):
            broken.append(f"{site.name}: the weights contain NaN or infinity")
            continue
        signal = energy(W)
        for fmt in missing:
            known[fmt.name] = squared_error(W, fake_quantize(W, fmt)) / max(signal, 1e-300)
        site.set("error", known)
        site.set("energy", signal)
    if broken:
        raise InputError(*broken)


def matrix(program: Program, site: Site) -> Tensor:
    """A site's weights as they will be rounded: [N, K], float32, all changes made."""
    return program.read(site).to(program.device)


def weighted_errors(program: Program, site: Site, formats: Sequence[Format], importance: Tensor) -> dict[str, float]:
    """sum of importance * (W - Q)^2 for each format; `importance` broadcasts against W [N, K]."""
    W = matrix(program, site)
    importance = importance.to(W.device, torch.float32)
    return {
        fmt.name: float((importance * (W.float() - fake_quantize(W, fmt).float()).square()).sum(dtype=torch.float64))
        for fmt in formats
    }


def annotate(site: Site, key: str, found: Mapping[str, float | list[float]]) -> None:
    """Add values by format to an annotation."""
    site.set(key, {**site.get(key, {}), **found})


def has(site: Site, key: str, formats: Sequence[Format]) -> bool:
    """Whether an annotation knows all these formats."""
    known = site.get(key, {})
    return all(fmt.name in known for fmt in formats)


def table(sites: Sequence[Site], formats: Sequence[Format], key: str) -> Tensor:
    """An annotation by format as [sites, formats]; NaN where nothing was measured."""
    rows = [[site.get(key, {}).get(fmt.name, float("nan")) for fmt in formats] for site in sites]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(sites), len(formats))


def values(sites: Sequence[Site], key: str) -> Tensor:
    """An annotation of all sites, [sites] float64."""
    return torch.tensor([site.get(key) for site in sites], dtype=torch.float64)


def error_table(sites: Sequence[Site], formats: Sequence[Format]) -> Tensor:
    """Squared errors ||W - Q||^2 [sites, formats]."""
    signal = torch.tensor([site.get("energy", 0.0) for site in sites], dtype=torch.float64)
    return table(sites, formats, "error") * signal[:, None]
