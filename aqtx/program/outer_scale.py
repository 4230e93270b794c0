"""NVFP4's scale per matrix where several matrices share one, as programs that fuse them ask for."""

from collections.abc import Mapping

import torch
from torch import Tensor

from aqtx.program.program import Program
from aqtx.program.site import Site


def largest_under_one_scale(program: Program, site: Site, sites: Mapping[str, Site]) -> Tensor | None:
    """float32 [1, 1]: the largest magnitude of all matrices that share the site's outer scale; None where none do.

    `sites` are the program's, by name. Weights are read as they are now, after whatever changed them since the plan.
    """
    names: list[str] | None = site.get("outer_scale")
    if not names:
        return None
    return torch.stack([program.read(sites[name]).abs().max() for name in names]).max().view(1, 1)
