"""`fisher`: 1/2 D^T F D, D = Q - W, F the Fisher information: the divergence of predictions that it foretells."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.method import Method, Own, register
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity.fisher import KEYS, domains_key, losses_along, measure_fisher
from aqtx.sensitivity.measured import Request, table


def measure(program: Program, wanted: Sequence[Request], own: Own, context: Context, seed: int) -> dict[str, Any]:
    """One backward pass per sequence."""
    count, detail = own["fisher_sequences"], own["fisher_detail"]
    measure_fisher(program, wanted, context, num_sequences=count, detail=detail)
    return {}


def cost(sites: Sequence[Site], formats: Sequence[Format], own: Own, seed: int) -> Tensor:
    """Nats per token."""
    return table(sites, formats, KEYS[own["fisher_detail"]])


def by_domain(sites: Sequence[Site], formats: Sequence[Format], own: Own) -> dict[str, Tensor]:
    """The same of each domain of the text alone."""
    key = domains_key(KEYS[own["fisher_detail"]])
    names = dict.fromkeys(name for site in sites for name in site.get(key, {}))
    unknown = float("nan")
    return {
        name: torch.tensor(
            [[site.get(key, {}).get(name, {}).get(fmt.name, unknown) for fmt in formats] for site in sites],
            dtype=torch.float64,
        )
        for name in names
    }


def again(
    program: Program, wanted: Sequence[Request], own: Own, context: Context, plan: Sequence[tuple[Site, Format]]
) -> dict[str, Tensor]:
    """Along each error, with the gradients of the model under the plan."""
    text = context.by_domain()[: own["fisher_sequences"]]
    found = losses_along(program, wanted, text.ids, context, plan)
    return {name: (losses * text.shares()).sum(1) for name, losses in found.items()}


register(
    Method(
        name="fisher",
        summary="the divergence of the model's predictions that gradients on calibration text foretell",
        options=("fisher_sequences", "fisher_detail", "objective", "rounds"),
        needs_text=True,
        walks=lambda own: ("backward", own["fisher_sequences"]),
        measure=measure,
        cost=cost,
        domains=by_domain,
        again=again,
        in_nats=True,
        arms={
            "fisher": {"fisher_detail": "direction", "objective": "mean"},
            "fisher_worst_domain": {"fisher_detail": "direction", "objective": "worst_domain"},
            "fisher_diagonal": {"fisher_detail": "element", "objective": "mean"},
            "fisher_matrix": {"fisher_detail": "matrix", "objective": "mean"},
        },
        slow_arms=("fisher_matrix", "fisher_worst_domain"),
    )
)
