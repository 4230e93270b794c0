"""The plan of one arm of a study."""

from dataclasses import replace
from typing import Any

from aqtx.errors import InputError
from aqtx.planning.arms import Arm
from aqtx.planning.decide import decide
from aqtx.program.plan import Plan
from aqtx.program.program import Program
from aqtx.registry import Context

_BISECTIONS = 14


def plan_arm(program: Program, arm: Arm, context: Context) -> tuple[Plan, dict[str, Any]]:
    """The arm's plan and its details; one that counts nominal bits gets the nominal budget closest to the real one.

    Raises:
        InputError: no nominal budget gives a plan of at most the arm's bits.
    """
    if not arm.settings.row.nominal:
        decision = decide(program, arm.settings, context)
        return decision.plan, decision.details
    low, high, best = 0.0, arm.bits, None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        try:
            plan = decide(program, replace(arm.settings, average_bits=middle), context).plan
        except InputError:  # below the cheapest plan
            low = middle
            continue
        fits = (plan.average_bits or 0.0) <= arm.bits
        low, high, best = (middle, high, plan) if fits else (low, middle, best)
    if best is None:
        raise InputError(f"{arm.name} has no plan of at most {arm.bits:g} bits")
    return best, {}
