"""`fisher`: 1/2 D^T F D, D = Q - W, F the Fisher information: the divergence of predictions that it foretells."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.method import Method, Own, register
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity.fisher import KEYS, measure_fisher
from aqtx.sensitivity.measured import Request, table


def measure(program: Program, wanted: Sequence[Request], own: Own, context: Context, seed: int) -> dict[str, Any]:
    """One backward pass per sequence."""
    count, detail = own["fisher_sequences"], own["fisher_detail"]
    measure_fisher(program, wanted, context, num_sequences=count, detail=detail)
    return {}


def cost(sites: Sequence[Site], formats: Sequence[Format], own: Own, seed: int) -> Tensor:
    """Nats per token."""
    return table(sites, formats, KEYS[own["fisher_detail"]])


register(
    Method(
        name="fisher",
        summary="the divergence of the model's predictions that gradients on calibration text foretell",
        options=("fisher_sequences", "fisher_detail"),
        needs_text=True,
        walks=lambda own: ("backward", own["fisher_sequences"]),
        measure=measure,
        cost=cost,
        arms={
            "fisher": {"fisher_detail": "direction"},
            "fisher_diagonal": {"fisher_detail": "element"},
            "fisher_matrix": {"fisher_detail": "matrix"},
        },
        slow_arms=("fisher_matrix",),
    )
)
