"""How sensitive the matrices of a model are by role and depth, read from its plan, for use on a relative of it.

A plan whose method foretells losses (`fisher`) says of each matrix what the chosen format loses and its relative
squared error. Their ratio hardly depends on the format, since losses are quadratic in the error. Its logarithm is
averaged over the matrices of one role in one layer; between layers it is interpolated over relative depth, 0 for the
first layer and 1 for the last. What single experts differ in is lost: no relative can know it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aqtx.errors import InputError
from aqtx.planning.manual import load_json
from aqtx.program.plan import Plan
from aqtx.program.roles import layer_of
from aqtx.program.site import Site


@dataclass(frozen=True)
class Profile:
    """ln(nats per token that a relative squared error of 1 would cost): role -> relative depths and values there."""

    curves: dict[str, tuple[list[float], list[float]]]

    def at(self, sites: Sequence[Site]) -> list[float]:
        """The value of each site of a model, at its role and relative depth."""
        depths = relative_depths([site.layer for site in sites])
        pairs = zip(sites, depths, strict=True)
        return [float(np.interp(depth, *self.curves[site.category])) for site, depth in pairs]

    def problems(self, sites: Sequence[Site]) -> list[str]:
        """A sentence where roles of a model are unknown to the profile."""
        unknown = sorted({site.category for site in sites} - set(self.curves))
        if not unknown:
            return []
        known = ", ".join(sorted(self.curves))
        return [f"prior: it says nothing of the role {', '.join(unknown)}, only of {known}; keep these matrices"]


def relative_depths(layers: Sequence[int | None]) -> list[float]:
    """0 for the first layer, 1 for the last; what is in no layer counts as the first."""
    last = max((layer for layer in layers if layer is not None), default=0)
    return [(layer or 0) / max(last, 1) for layer in layers]


def read_profile(prior: str | dict[str, Any] | None) -> Profile:
    """From plan.json, a folder that holds one (of a run or of `aqtx plan`), or its content.

    Raises:
        InputError: it is no plan of a model, or its method foretold no losses.
    """
    if prior is None:
        raise InputError("prior: method prior needs the plan of a relative")
    folder = isinstance(prior, str) and Path(prior).is_dir()
    data = load_json(str(Path(str(prior)) / "plan.json") if folder else prior)
    if not isinstance(data.get("sites"), dict) or "method" not in data:
        raise InputError("prior: no plan.json of a model, which has `method` and `sites`; make one with `aqtx plan`")
    plan = Plan.from_json(data)
    planned = list(plan.planned.items())
    found: dict[tuple[str, float], list[float]] = {}
    for (_, entry), depth in zip(planned, relative_depths([layer_of(name) for name, _ in planned]), strict=True):
        if entry.cost and entry.error and entry.cost > 0:
            found.setdefault((entry.category, depth), []).append(math.log(entry.cost / entry.error))
    if not found:
        raise InputError(f"prior: its method, {plan.method}, foretold no losses; make the plan with method fisher")
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for (role, depth), values in sorted(found.items()):
        depths, means = curves.setdefault(role, ([], []))
        depths.append(depth)
        means.append(sum(values) / len(values))
    return Profile(curves)
