"""`error`: e_lf = ||W_l - Q_f(W_l)||_F^2 of format f at site l, measured."""

from collections.abc import Sequence

from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.method import Method, Own, register
from aqtx.program.site import Site
from aqtx.sensitivity.measured import error_table


def cost(sites: Sequence[Site], formats: Sequence[Format], own: Own, seed: int) -> Tensor:
    """The squared errors."""
    return error_table(sites, formats)


register(Method(name="error", summary="the measured squared error alone", cost=cost, arms={"error": {}}))
