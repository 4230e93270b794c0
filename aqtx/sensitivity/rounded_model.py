"""A model under a plan, without codes: its weights replaced by the values that round-to-nearest would give.

For trying many plans on one text: rounded matrices are kept and used again, and nothing of the program changes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from aqtx.formats import fake_quantize, parse
from aqtx.program.program import Program, taking_ids_to
from aqtx.program.site import Site
from aqtx.sensitivity.selection import unique_sites

CACHE_BYTES = 1 << 30


@dataclass
class RoundedModel:
    """Runs a program under plans, one after the other."""

    program: Program
    module: fx.GraphModule = field(init=False)
    _sites: dict[str, Site] = field(init=False)
    _cache: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    _cached_bytes: int = 0
    _changed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """One module, whose parameters are replaced from plan to plan."""
        module = self.program.module()
        assert isinstance(module, fx.GraphModule)
        self.module, self._sites = module, unique_sites(self.program)

    def use(self, formats: Mapping[str, str | None]) -> Callable[[Tensor], Tensor]:
        """Token ids -> logits under a plan, site name -> format; None and bf16 leave a site as it is."""
        rounded: dict[str, list[tuple[Site, str]]] = {}
        for name, fmt in formats.items():
            if fmt not in (None, "bf16"):
                rounded.setdefault(self._sites[name].weight, []).append((self._sites[name], str(fmt)))
        for weight in self._changed | set(rounded):
            value = self.program.weights.get(weight).to(self.program.device, copy=True)
            for site, fmt in rounded.get(weight, []):
                value[() if site.expert is None else site.expert] = self._matrix(site, fmt)
            self.module.get_parameter(weight).data = value
        self._changed = set(rounded)
        return taking_ids_to(self.program.device, self.module)

    def _matrix(self, site: Site, fmt: str) -> Tensor:
        key = (site.name, fmt)
        if key not in self._cache:
            W = self.program.read(site).to(self.program.device)
            value = fake_quantize(W, parse(fmt)).to(self.program.dtype)
            if self._cached_bytes + value.nbytes > CACHE_BYTES:
                return value
            self._cache[key] = value
            self._cached_bytes += value.nbytes
        return self._cache[key]


@torch.no_grad()
def mean_loss(forward: Callable[[Tensor], Tensor], ids: Tensor, *, batch_size: int = 8) -> float:
    """Nats per token of next-token prediction over sequences [n, length]."""
    total = 0.0
    for batch in ids.split(batch_size):
        logits = forward(batch)[:, :-1].float().flatten(0, 1)
        targets = batch[:, 1:].flatten().to(logits.device)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total / (ids.shape[0] * (ids.shape[1] - 1))
