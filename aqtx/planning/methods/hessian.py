"""`hessian`: sum_nk h_k (W - Q)_nk^2, h_k the mean square of input channel k over calibration text."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.method import Method, Own, register
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity.inputs import measure_inputs
from aqtx.sensitivity.measured import Request, table


def measure(program: Program, wanted: Sequence[Request], own: Own, context: Context, seed: int) -> dict[str, Any]:
    """One run over the text, block by block."""
    measure_inputs(program, wanted, context)
    return {}


def cost(sites: Sequence[Site], formats: Sequence[Format], own: Own, seed: int) -> Tensor:
    """The weighted errors."""
    return table(sites, formats, "hessian")


register(
    Method(
        name="hessian",
        summary="squared error weighted by how strong each input channel is on calibration text",
        needs_text=True,
        walks=lambda own: ("forward", None),
        measure=measure,
        cost=cost,
        arms={"hessian": {}},
    )
)
