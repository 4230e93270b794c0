"""Annotate what a method's costs are made of, where earlier passes have not done so."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from aqtx.planning.settings import Settings
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity.calibrated import alpha_variants, annotate_fit, fit, log_ratio
from aqtx.sensitivity.fisher import KEYS, measure_fisher
from aqtx.sensitivity.inputs import measure_inputs
from aqtx.sensitivity.measured import Request, measure
from aqtx.sensitivity.trial import measure_trials


def prepare(
    program: Program, wanted: Sequence[Request], settings: Settings, context: Context, seed: int
) -> dict[str, Any]:
    """Annotate; returns what a report should tell of it, the seconds that it took among them."""
    started = time.perf_counter()
    measure(program, context.progress(wanted, description="measured error"))
    if settings.method in ("hessian", "pmq"):
        measure_inputs(program, wanted, context)
    if settings.method == "fisher":
        _fisher(program, wanted, settings, context)
    if settings.method == "trial":
        _trial(program, wanted, settings, context)
    details = _calibrate(program, wanted, settings, context, seed) if settings.method == "calibrated" else {}
    return {**details, "seconds": round(time.perf_counter() - started, 2)}


def _fisher(program: Program, wanted: Sequence[Request], settings: Settings, context: Context) -> None:
    measure_fisher(
        program,
        wanted,
        context,
        num_sequences=settings.fisher_sequences,
        detail=settings.fisher_detail,
    )


def _trial(program: Program, wanted: Sequence[Request], settings: Settings, context: Context) -> None:
    smallest = [(site, formats[:1]) for site, formats in wanted]
    measure_trials(program, smallest, context, measure="loss", num_sequences=settings.trial_sequences)


def _calibrate(
    program: Program, wanted: Sequence[Request], settings: Settings, context: Context, seed: int
) -> dict[str, Any]:
    """Measure, fit alpha to it, annotate; the details tell the fit."""
    sites = [site for site, _ in wanted]
    if settings.fit_to == "fisher":
        smallest = [(site, formats[:1]) for site, formats in wanted]
        _fisher(program, smallest, settings, context)
        key = KEYS[settings.fisher_detail]
    else:
        _trial(program, _sample(wanted, settings.num_trials, seed), settings, context)
        key = "trial_loss"
    targets = [_target(site, key) for site in sites]
    scores = alpha_variants(program, sites)
    found = fit(scores, torch.tensor(targets, dtype=torch.float64), [site.category for site in sites])
    annotate_fit(found, scores[found.variant], sites)
    return {"calibrated": {**found.to_json(), "fit_to": settings.fit_to}}


def _target(site: Site, key: str) -> float:
    """The logarithm of the measured loss per unit of squared error."""
    measured = site.get(key, {})
    if not measured:
        return float("nan")
    name = next(iter(measured))
    return log_ratio(measured[name], site.get("error")[name] * site.get("energy"))


def _sample(wanted: Sequence[Request], count: int, seed: int) -> list[Request]:
    """About `count` sites, as many of each role, drawn by the seed."""
    roles: dict[str, list[Request]] = {}
    for request in wanted:
        roles.setdefault(request[0].category, []).append(request)
    each = -(-count // max(len(roles), 1))
    generator = torch.Generator().manual_seed(seed)
    return [
        members[index]
        for members in roles.values()
        for index in sorted(torch.randperm(len(members), generator=generator)[:each].tolist())
    ]
