"""The decision that a method takes: the sites, the formats each may take, and their bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.formats.table import Format
from aqtx.program.site import Site


@dataclass(frozen=True)
class Options:
    """The decision to take. Tables are [sites, formats]; formats ascend in size, those that only a pin names last."""

    sites: list[Site]
    formats: list[Format]
    num_candidates: int  # of the formats: what a site without a pin may take
    size: Tensor  # stored bytes
    allowed: Tensor  # bool
    groups: list[int]  # a number per site, equal where sites must share a format
    counted: Tensor  # bytes as the budget counts them: by the share of tokens that read a site, or nominal bits
    weights: float  # of all sites, counted so that counted bytes * 8 / weights are average bits

    def total(self, choice: Tensor) -> float:
        """Counted bytes of a choice, a format index per site."""
        return float(self.counted.gather(1, choice[:, None]).sum())

    def nearest(self, choice: Tensor) -> Tensor:
        """A choice moved to what pins and limits allow: the format nearest in size, one for all sites of a group."""
        number = {group: row for row, group in enumerate(dict.fromkeys(self.groups))}
        group = torch.tensor([number[each] for each in self.groups], dtype=torch.long)
        chosen = self.size.gather(1, choice[:, None])
        distance = torch.where(self.allowed, (self.size - chosen).abs(), torch.inf)
        shared = torch.zeros(len(number), distance.shape[1], dtype=distance.dtype).index_add_(0, group, distance)
        return shared.argmin(1)[group]
