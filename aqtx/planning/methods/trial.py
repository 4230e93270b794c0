"""`trial`: the divergence when l alone is rounded to its smallest format, in proportion to e_lf for the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.method import Method, Own, register
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity.measured import Request, error_table, smallest, table
from aqtx.sensitivity.trial import measure_trials


def measure(program: Program, wanted: Sequence[Request], own: Own, context: Context, seed: int) -> dict[str, Any]:
    """Round every matrix alone and run the model."""
    measure_trials(program, smallest(wanted), context, measure="loss", num_sequences=own["trial_sequences"])
    return {}


def cost(sites: Sequence[Site], formats: Sequence[Format], own: Own, seed: int) -> Tensor:
    """The measured divergence at one format, carried over to the others by their errors."""
    errors = error_table(sites, formats)
    measured = table(sites, formats, "trial_loss")
    first = measured.isfinite().to(torch.int64).argmax(1, keepdim=True)
    return (measured / errors.clamp_min(1e-300)).gather(1, first) * errors


register(
    Method(
        name="trial",
        summary="the divergence measured when each matrix alone is rounded; slow",
        options=("trial_sequences",),
        needs_text=True,
        walks=lambda own: ("trials", own["trial_sequences"]),
        measure=measure,
        cost=cost,
        in_nats=True,
        arms={"trial": {}},
        slow_arms=("trial",),
    )
)
