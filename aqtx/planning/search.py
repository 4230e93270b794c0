"""`search`: as few bits as a perplexity ceiling allows, found by evaluating real candidates.

Perplexity falls with the budget, up to noise, so the budget is bisected between the cheapest plan (or the
target, `average_bits`) and the largest. Every candidate is planned by the base method, rounded to nearest and
scored on calibration text; the smallest that stayed below the ceiling is taken.
"""

import math
from collections.abc import Callable
from typing import Any

from aqtx.errors import InputError
from aqtx.numerics.allocate import Allocation, least_size
from aqtx.planning.options import largest_size
from aqtx.planning.question import Options
from aqtx.planning.settings import Settings
from aqtx.program.program import Program
from aqtx.registry import Context
from aqtx.sensitivity.rounded_model import RoundedModel, mean_loss


def search(
    program: Program, options: Options, settings: Settings, context: Context, solve: Callable[[float], Allocation]
) -> tuple[Allocation, list[dict[str, Any]]]:
    """The smallest plan below the ceiling, and what was tried; InputError where even the largest is above it."""
    ids = context.calibration()
    model = RoundedModel(program, context.room(), context.work)
    before = mean_loss(model.use({}), ids)
    ceiling = before + math.log(settings.perplexity_ceiling)
    low, high = _ends(options, settings)
    tried: list[dict[str, Any]] = []

    def good(budget: float) -> Allocation | None:
        found = solve(budget)
        formats = {s.name: options.formats[i].name for s, i in zip(options.sites, found.choice.tolist(), strict=True)}
        loss = mean_loss(model.use(formats), ids)
        bits = found.size * 8 / options.weights
        tried.append({"average_bits": bits, "perplexity_ratio": math.exp(loss - before), "accepted": loss <= ceiling})
        return found if loss <= ceiling else None

    best = good(low)
    if best is not None:
        return best, tried
    best = good(high)
    if best is None:
        ratio = tried[-1]["perplexity_ratio"]
        raise InputError(f"the largest plan already has {ratio:.4f} times the perplexity, above perplexity_ceiling")
    for _ in context.progress(range(settings.search_steps - 2), description="search"):
        middle = (low + high) / 2
        found = good(middle)
        best = found or best
        low, high = (low, middle) if found else (middle, high)
    return best, tried


def _ends(options: Options, settings: Settings) -> tuple[float, float]:
    """Bytes of the smallest plan that is wanted and of the largest there is."""
    least = least_size(options.counted, options.allowed, options.groups)
    target = 0.0 if settings.average_bits is None else settings.average_bits * options.weights / 8
    return max(least, target), largest_size(options)
