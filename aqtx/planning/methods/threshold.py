"""`threshold`: the larger of two candidates on the sensitive side of one alpha, the smaller on the other."""

from torch import Tensor

from aqtx.planning.by_alpha import LOW_FIRST
from aqtx.planning.method import Method, Own, register
from aqtx.planning.question import Options
from aqtx.sensitivity.measured import values


def choose(options: Options, own: Own, budget: float | None) -> Tensor:
    """By the side on which each alpha lies."""
    alphas, border = values(options.sites, "alpha"), float(own["alpha_threshold"] or 0.0)
    sensitive = alphas < border if own["direction"] == LOW_FIRST else alphas > border
    return options.nearest(sensitive.long())


register(
    Method(
        name="threshold",
        summary="two candidates with one alpha as the border",
        options=("direction", "alpha_threshold"),
        needs=("alpha",),
        choose=choose,
        budget="own",
        candidates=("mxfp4", "mxfp8"),
        counts=(2,),
    )
)
