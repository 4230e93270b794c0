"""`pmq`: an expert's frequency x its summed gate weight x e_lf, the squared error."""

from collections.abc import Sequence

from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.method import Method, Own, register
from aqtx.planning.methods.hessian import measure
from aqtx.program.site import Site
from aqtx.sensitivity.measured import error_table, values


def cost(sites: Sequence[Site], formats: Sequence[Format], own: Own, seed: int) -> Tensor:
    """Squared errors, larger for experts that are asked often."""
    weight = values(sites, "frequency") * values(sites, "gate_weight")
    return weight[:, None] * error_table(sites, formats)


register(
    Method(
        name="pmq",
        summary="squared error weighted by how often and how strongly experts are asked",
        needs_text=True,
        walks=lambda own: ("forward", None),
        measure=measure,
        cost=cost,
        arms={"pmq": {}},
    )
)
