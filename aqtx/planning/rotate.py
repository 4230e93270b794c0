"""Which inputs to rotate, decided together with the formats.

A rotation costs no bytes. All planned readers of one input share the choice, so that one node serves them.
Formats and rotations are improved in turn until nothing changes, from all inputs plain, from all rotated, and
from the choice that is best when bytes have one price; each step can only lower the cost. The bound on any
choice lets every site choose for itself.

Errors of single inputs, measured one by one, do not add up where four bits break a model: with channels planted 64
times as large, rotations that lowered most of them did harm together. So the whole rounded model is run on the
calibration text with the rotations chosen, with none and with all, and another set than the chosen one is taken
where the loss is lower beyond twice its standard error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aqtx.numerics.allocate import Allocation
from aqtx.numerics.intervals import clearly_less
from aqtx.planning.settings import Settings
from aqtx.program.names import expert_key
from aqtx.program.plan import Plan, PlanEntry
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.rotation.select import input_rotation
from aqtx.sensitivity.measured import Request
from aqtx.sensitivity.rotation import annotation, measure_rotations
from aqtx.sensitivity.rounded_run import Rounding, sequence_losses

_ROUNDS = 20
_HALVINGS = 60


@dataclass(frozen=True)
class Rotations:
    """Measured errors of the blocks by site and format, plain and rotated [sites, formats]; NaN where not measured."""

    sites: Sequence[Site]
    plain: Tensor
    rotated: Tensor
    block: int

    @property
    def inputs(self) -> Tensor:
        """A number per site, equal for the readers of one input."""
        numbers: dict[object, int] = {}
        return torch.tensor([numbers.setdefault(site.node.args[0], len(numbers)) for site in self.sites])

    @property
    def ratio(self) -> Tensor:
        """The factor by which a rotation changes what a site loses; 1 where it was not measured."""
        return torch.nan_to_num(self.rotated / self.plain.clamp_min(1e-300), nan=1.0)

    @property
    def possible(self) -> Tensor:
        """Sites whose input may be rotated: all readers of it are measured, and it is not rotated yet."""
        free = [input_rotation(site.node) is None for site in self.sites]
        own = torch.tensor(free, dtype=torch.bool) & ~self.plain.isnan().all(1)
        return self._by_input((~own).double())[self.inputs] == 0

    def choose(self, choice: Tensor, cost: Tensor | None = None) -> Tensor:
        """Rotated sites, bool, for given formats: the inputs whose readers lose less in sum."""
        rows = torch.arange(len(choice))
        plain = (self.plain if cost is None else cost)[rows, choice]
        gain = torch.nan_to_num(plain * (1 - self.ratio[rows, choice]))
        return (self._by_input(gain)[self.inputs] > 0) & self.possible

    def solve(self, cost: Tensor, size: Tensor, solve: Callable[[Tensor], Allocation]) -> tuple[Allocation, Tensor]:
        """Formats and rotated sites of least cost that the steps find, with a bound that holds for any choice."""
        found: list[tuple[Allocation, Tensor]] = []
        plain = torch.zeros_like(self.possible)
        for rotated in (plain, self.possible, self.priced(cost, size, solve(cost).size)):
            for _ in range(_ROUNDS):
                allocation = solve(self._cost(cost, rotated))
                found.append((allocation, rotated))
                better = self.choose(allocation.choice, cost)
                if torch.equal(better, rotated):
                    break
                rotated = better
        free = self._cost(cost, self.possible[:, None] & (self.ratio < 1))
        bound = solve(free).bound
        best, rotated = min(found, key=lambda pair: pair[0].cost)
        gap = best.cost / bound - 1 if bound > 0 else 0.0
        return replace(best, bound=bound, gap=gap), rotated

    def priced(self, cost: Tensor, size: Tensor, budget: float) -> Tensor:
        """Rotated sites where bytes have one price, at which about `budget` of them are bought: by input, the cheaper
        of plain and rotated when every reader takes the format that is best at that price."""
        low, high, rotated = 0.0, float((cost.nan_to_num(0.0).max() + 1) / size.min().clamp_min(1e-9)), self.possible
        for _ in range(_HALVINGS):
            price = (low + high) / 2
            totals = [
                self._cost(cost, turned) + price * size for turned in (torch.zeros_like(self.possible), self.possible)
            ]
            best = [total.nan_to_num(float("inf")).min(1) for total in totals]
            sums = [self._by_input(each.values)[self.inputs] for each in best]
            rotated = (sums[1] < sums[0]) & self.possible
            choice = torch.where(rotated, best[1].indices, best[0].indices)
            spent = float(size.gather(1, choice[:, None]).sum())
            low, high = (price, high) if spent > budget else (low, price)
        return rotated

    def priced_at(self, found: Allocation, cost: Tensor, rotated: Tensor) -> Allocation:
        """The allocation with the cost that it has under these rotations."""
        total = float(self._cost(cost, rotated).gather(1, found.choice[:, None]).sum())
        return replace(found, cost=total, gap=total / found.bound - 1 if found.bound > 0 else 0.0)

    def note(self, plan: Plan, rotated: Tensor) -> Plan:
        """The plan with its rotations; of a stack with a rotated expert all experts are, since they share an input."""
        weights = {site.weight for site, turned in zip(self.sites, rotated.tolist(), strict=True) if turned}
        return replace(plan, sites=_noted(plan, self.sites, weights, self.block))

    def details(self, rotated: Tensor) -> dict[str, object]:
        """What the report tells."""
        inputs = self.inputs
        return {"block": self.block, "inputs": int(inputs.max()) + 1, "rotated": len(set(inputs[rotated].tolist()))}

    def _by_input(self, values: Tensor) -> Tensor:
        inputs = self.inputs
        return torch.zeros(int(inputs.max()) + 1, dtype=values.dtype).index_add_(0, inputs, values)

    def _cost(self, cost: Tensor, rotated: Tensor) -> Tensor:
        rows = rotated if rotated.dim() == 2 else rotated[:, None]
        return torch.where(rows, cost * self.ratio, cost)


def confirmed(
    program: Program, rotations: Rotations, chosen: tuple[Tensor, Tensor], settings: Settings, context: Context
) -> Tensor:
    """Rotated sites to take for the chosen (formats, rotated sites): these, none or all, as calibration text says."""
    choice, rotated = chosen
    formats = [settings.formats[column] for column in choice.tolist()]
    planned = list(zip(rotations.sites, formats, strict=True))
    rounding = Rounding(program, rotations.block, context.seed, settings.activations)
    others = [turned for turned in (torch.zeros_like(rotated), rotations.possible) if not torch.equal(turned, rotated)]
    best: tuple[Tensor, Tensor] | None = None
    for turned in [rotated, *others] if others else []:
        nodes = {site.node for site, is_turned in zip(rotations.sites, turned.tolist(), strict=True) if is_turned}
        losses = sequence_losses(rounding, planned, nodes, context)
        if best is None or clearly_less(losses, best[1]):
            best = turned, losses
    return rotated if best is None else best[0]


def measured(program: Program, wanted: Sequence[Request], settings: Settings, context: Context) -> Rotations:
    """Measure what rotations gain on the sites and formats that are to be decided."""
    block, activation = settings.rotation_block, settings.activations
    measure_rotations(program, wanted, context, block=block, activation=activation)
    sites, names = [site for site, _ in wanted], [fmt.name for fmt in settings.formats]
    known = [site.get(annotation(block, activation), {}) for site in sites]
    table = torch.tensor(
        [[row.get(name, [float("nan")] * 2) for name in names] for row in known], dtype=torch.float64
    ).reshape(len(sites), len(names), 2)
    return Rotations(sites, table[..., 0], table[..., 1], block)


def _noted(plan: Plan, sites: Sequence[Site], weights: set[str], block: int) -> dict[str, PlanEntry]:
    turned = {name for site in sites if site.weight in weights for name in _stack(site)}
    return {name: replace(entry, rotation=block) if name in turned else entry for name, entry in plan.sites.items()}


def _stack(site: Site) -> list[str]:
    if site.expert is None:
        return [site.name]
    return [expert_key(site.weight, expert).removesuffix(".weight") for expert in range(site.slots)]
