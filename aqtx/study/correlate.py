"""Does a sensitivity rank matrices as rounding them one at a time does?"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from aqtx.errors import InputError
from aqtx.formats import Format
from aqtx.planning.arms import Arm
from aqtx.planning.options import divide
from aqtx.planning.settings import Settings
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Calibration, Context
from aqtx.sensitivity.trial import try_all

FIRST_TRIALS = 8  # that share a run through the model


@dataclass(frozen=True)
class Truth:
    """The divergence that each of some sites causes when it alone is rounded to the smallest format."""

    sites: list[Site]
    loss: list[float]  # nats per token
    format: Format


def measure_truth(program: Program, settings: Settings, context: Context, seconds: float, ids: Tensor) -> Truth:
    """Try sites in a seeded order, roles in turn, on text `ids` that no sensitivity has seen, until the time is up.

    Nothing is annotated: a method that tries matrices itself is held against this, not replaced by it.
    """
    sites, fmt = divide(program, settings).planned, settings.formats[0]
    found = Truth([], [], fmt)
    stop = time.perf_counter() + seconds
    waiting, size = _in_turns(sites, context.seed), FIRST_TRIALS
    while waiting and time.perf_counter() < stop:
        tried, waiting = waiting[:size], waiting[size:]
        for (site, _), loss in try_all(program, [(site, fmt) for site in tried], ids, context, measure="loss").items():
            found.sites.append(site)
            found.loss.append(loss)
        size *= 2  # so the last round takes at most half of all the time
    return found


def held_out(text: Calibration, count: int) -> tuple[Calibration, Calibration]:
    """Calibration sequences for the sensitivities, and the last ones, at most half of them, for the truth.

    Raises:
        InputError: there is no text for one of the two.
    """
    total = len(text.ids)
    count = min(count, total // 2)
    if count < 1:
        raise InputError(f"{total} calibration sequences cannot be split: a study ranks on text that no method saw")
    return text[:-count], text[-count:]


def _in_turns(sites: Sequence[Site], seed: int) -> list[Site]:
    """A random order in which roles take turns, so that any beginning of it is balanced."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = [sites[i] for i in torch.randperm(len(sites), generator=generator).tolist()]
    turn: dict[str, int] = {}
    keyed = []
    for site in shuffled:
        turn[site.category] = turn.get(site.category, 0) + 1
        keyed.append((turn[site.category], site))
    return [site for _, site in sorted(keyed, key=lambda pair: pair[0])]


def correlations(program: Program, truth: Truth, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of each arm's cost with the truth: over all sites, and within roles on average."""
    rows = []
    for arm in {arm.name: arm for arm in arms}.values():
        settings = arm.settings
        if settings.row.cost is None or len(truth.sites) < 3:
            continue
        costs = settings.row.cost(truth.sites, [truth.format], settings.own, arm.seed)
        values = costs.flatten().tolist()
        rows.append({"method": arm.name, "all": _rank(values, truth.loss), "within_roles": _within(values, truth)})
    return rows + _alpha_rows(truth)


def _alpha_rows(truth: Truth) -> list[dict[str, Any]]:
    """Alpha itself against the loss per unit of squared error: negative where a low alpha marks a sensitive matrix."""
    pairs = [
        (site, loss / (site.get("error")[truth.format.name] * site.get("energy")))
        for site, loss in zip(truth.sites, truth.loss, strict=True)
        if site.get("alpha") is not None and site.get("error", {}).get(truth.format.name)
    ]
    if len(pairs) < 3:
        return []
    part = Truth([site for site, _ in pairs], [value for _, value in pairs], truth.format)
    alphas = [site.get("alpha") for site in part.sites]
    return [
        {
            "method": "alpha itself, against the loss per unit of error",
            "all": _rank(alphas, part.loss),
            "within_roles": _within(alphas, part),
        }
    ]


def _rank(values: Sequence[float], truth: Sequence[float]) -> float | None:
    value = float(spearmanr(values, truth)[0]) if len(set(values)) > 1 and len(set(truth)) > 1 else float("nan")
    return round(value, 4) if np.isfinite(value) else None


def _within(values: Sequence[float], truth: Truth) -> float | None:
    """The mean over roles, weighted by their number of sites."""
    roles: dict[str, list[int]] = {}
    for index, site in enumerate(truth.sites):
        roles.setdefault(site.category, []).append(index)
    found = []
    for rows in roles.values():
        rank = _rank([values[i] for i in rows], [truth.loss[i] for i in rows]) if len(rows) >= 3 else None
        if rank is not None:
            found.append((rank, len(rows)))
    total = sum(count for _, count in found)
    return round(sum(rank * count for rank, count in found) / total, 4) if total else None
