"""A plan for text of several domains: what it is foretold to cost each, and the plan whose worst domain is best off."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.numerics.allocate import Allocation
from aqtx.numerics.minimax import least_regret, regrets
from aqtx.planning.question import Options
from aqtx.planning.settings import Settings

Solve = Callable[[Tensor], Allocation]  # costs [sites, formats] -> the best plan within the budget


@dataclass(frozen=True)
class Domains:
    """Costs by domain [D, sites, formats], and what each domain would lose under the plan that is best for it alone."""

    names: list[str]
    cost: Tensor
    own: list[Allocation]

    @classmethod
    def of(cls, settings: Settings, options: Options, solve: Solve) -> "Domains | None":
        """From what sites are annotated with; None where the method or the text knows no domains."""
        row = settings.row
        costs = {} if row.domains is None else row.domains(options.sites, options.formats, settings.own)
        if len(costs) < 2:
            return None
        return cls(list(costs), torch.stack(list(costs.values())), [solve(cost) for cost in costs.values()])

    @property
    def least(self) -> Tensor:
        """What each domain loses at least [D]."""
        return torch.tensor([found.cost for found in self.own], dtype=torch.float64)

    def worst(self, mean: Tensor, solve: Solve) -> tuple[Allocation, dict[str, Any]]:
        """The plan of least largest regret, its cost by the `mean` costs, and how near the optimum it is."""
        found = least_regret(self.cost, self.least, solve)
        cost = float(mean.gather(1, found.choice[:, None]).sum())
        facts = {"regret": float(found.regret.max()), "bound": found.bound, "gap": found.gap, "plans": found.rounds}
        return Allocation(found.choice, cost, float("nan"), float("nan"), float("nan")), facts

    def table(self, choice: Tensor) -> dict[str, dict[str, float]]:
        """domain -> predicted loss, that of its own best plan at the same bytes, and their ratio, the regret."""
        reached = self.cost.gather(2, choice.expand(len(self.cost), -1)[..., None]).sum((1, 2)).tolist()
        ratio = regrets(self.cost, choice, self.least).tolist()
        rows = zip(self.names, reached, self.least.tolist(), ratio, strict=True)
        return {name: {"loss": loss, "own": own, "regret": regret} for name, loss, own, regret in rows}


def needs_domains() -> InputError:
    """Why there is no worst domain."""
    return InputError(
        "objective worst_domain needs calibration text of two domains or more, and this text has one: give "
        "`calibration: {source: {A: 1, B: 1}}`, or text that names its domains"
    )
