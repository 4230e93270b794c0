"""From settings to a plan."""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.formats.table import parse
from aqtx.numerics.allocate import Allocation, allocate
from aqtx.planning.domains import Domains, needs_domains
from aqtx.planning.groups import group_numbers
from aqtx.planning.manual import Scheme, read_manual
from aqtx.planning.options import Division, build_options, divide, limit
from aqtx.planning.question import Options
from aqtx.planning.rotate import confirmed, measured
from aqtx.planning.search import search
from aqtx.planning.settings import Settings
from aqtx.planning.target import FREE
from aqtx.program.plan import Plan, PlanEntry
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context
from aqtx.sensitivity.measured import Request, measure
from aqtx.sensitivity.selection import unique_sites


@dataclass(frozen=True)
class Decision:
    """A plan, and what a report should tell of how it was found."""

    plan: Plan
    details: dict[str, Any]


def decide(program: Program, settings: Settings, context: Context) -> Decision:
    """The plan for a program; annotates what the method needs and lacks, else changes nothing."""
    division = divide(program, settings)
    if settings.method == "manual":
        return Decision(_manual(program, division, settings), {})
    options = build_options(program, division, settings)
    budget = limit(program, options, settings)
    if settings.row.choose is not None:
        choice = settings.row.choose(options, settings.own, budget)
        decision = Decision(_plan(program, division, options, settings, (choice, None, None)), {})
        return _rotated(decision, program, options, settings, context, choice)
    cost, details = _costs(program, options, settings.costed, context)
    if settings.method == "search":
        found, details["search"] = search(
            program, options, settings, context, partial(_allocate, cost, options, settings)
        )
    elif settings.rotate == "auto":
        rotations = measured(program, _requests(options), settings, context)
        found, rotated = rotations.solve(cost, options.size, lambda joint: _allocate(joint, options, settings, budget))
        rotated = confirmed(program, rotations, (found.choice, rotated), settings, context)
        found = rotations.priced_at(found, cost, rotated)
        plan = _plan(program, division, options, settings, (found.choice, cost, found))
        return Decision(rotations.note(plan, rotated), {**details, "rotation": rotations.details(rotated)})
    else:
        found, facts = _solved(cost, options, settings, budget)
        details |= facts
        if settings.rounds > 1:
            found, cost, details["rounds"] = _rounds(program, (cost, found), options, settings, context)
            details |= _by_domain(options, settings, budget, found)
        if settings.target != FREE:
            details["target"] = _price(cost, options, settings, budget, found)
    plan = _plan(program, division, options, settings, (found.choice, cost, found))
    plan = replace(plan, **{key: details.pop(key) for key in ("domains", "worst_domain") if key in details})
    decision = Decision(plan, details)
    return _rotated(decision, program, options, settings, context, found.choice)


def _costs(program: Program, options: Options, settings: Settings, context: Context) -> tuple[Tensor, dict[str, Any]]:
    """Costs [sites, formats], and what a report should tell of how they were measured; the seconds among it."""
    row, own = settings.row, settings.own
    assert row.cost is not None
    seed = context.seed if settings.seed is None else settings.seed
    started = time.perf_counter()
    measure(program, context.progress(_requests(options), description="measured error"))
    details = {} if row.measure is None else row.measure(program, _requests(options), own, context, seed)
    details["seconds"] = round(time.perf_counter() - started, 2)
    return row.cost(options.sites, options.formats, own, seed), details


def _rotated(
    decision: Decision, program: Program, options: Options, settings: Settings, context: Context, choice: Tensor
) -> Decision:
    """The decision with the rotations that help the formats it chose, where settings ask for them."""
    if settings.rotate == "none":
        return decision
    wanted = [(site, [options.formats[i]]) for site, i in zip(options.sites, choice.tolist(), strict=True)]
    rotations = measured(program, wanted, settings, context)
    rotated = confirmed(program, rotations, (choice, rotations.choose(choice)), settings, context)
    details = {**decision.details, "rotation": rotations.details(rotated)}
    return Decision(rotations.note(decision.plan, rotated), details)


def _requests(options: Options) -> list[Request]:
    """The formats that each site may take."""
    return [
        (site, [fmt for fmt, is_allowed in zip(options.formats, row, strict=True) if is_allowed])
        for site, row in zip(options.sites, options.allowed.tolist(), strict=True)
    ]


def _allocate(cost: Tensor, options: Options, settings: Settings, budget: float | None) -> Allocation:
    if budget is None:
        raise InputError(f"method {settings.method} needs average_bits or budget_bytes")
    exact = settings.prove or None
    return allocate(cost, options.counted, budget, exact=exact, groups=options.groups, allowed=options.allowed)


def own_plans(program: Program, settings: Settings, context: Context) -> dict[str, dict[str, str]]:
    """For each domain of the text the plan that is best for it alone, site name -> format; nothing for one domain."""
    options = build_options(program, divide(program, settings), settings)
    budget = limit(program, options, settings)
    _costs(program, options, settings.costed, context)
    domains = Domains.of(settings, options, lambda each: _allocate(each, options, settings, budget))
    if domains is None:
        return {}
    names = [site.name for site in options.sites]
    return {
        domain: {name: options.formats[i].name for name, i in zip(names, found.choice.tolist(), strict=True)}
        for domain, found in zip(domains.names, domains.own, strict=True)
    }


def _solved(
    cost: Tensor, options: Options, settings: Settings, budget: float | None
) -> tuple[Allocation, dict[str, Any]]:
    """The best plan by the settings' objective; of text in several domains also what it costs each."""
    if settings.objective == "mean":
        found = _allocate(cost, options, settings, budget)
        return found, _by_domain(options, settings, budget, found)
    domains = Domains.of(settings, options, lambda each: _allocate(each, options, settings, budget))
    if domains is None:
        raise needs_domains()
    quick = replace(settings, prove=False)  # a hundred plans of a thousandth's gap each; their bounds hold
    found, facts = domains.worst(cost, lambda each: _allocate(each, options, quick, budget))
    return found, {"domains": domains.table(found.choice), "worst_domain": facts}


def _by_domain(options: Options, settings: Settings, budget: float | None, found: Allocation) -> dict[str, Any]:
    """What a plan costs each domain of the text, where there are several."""
    domains = Domains.of(settings, options, lambda each: _allocate(each, options, settings, budget))
    return {} if domains is None else {"domains": domains.table(found.choice)}


def _rounds(
    program: Program, first: tuple[Tensor, Allocation], options: Options, settings: Settings, context: Context
) -> tuple[Allocation, Tensor, list[dict[str, float]]]:
    """Plan again by costs at the weights of the plan before; the last plan, its costs, and a row for each round."""
    cost, found = first
    again, told = settings.row.again, [{"cost": found.cost, "changed": 0}]
    assert again is not None
    budget = limit(program, options, settings)
    for _ in range(settings.rounds - 1):
        before = found.choice
        plan = [(site, options.formats[i]) for site, i in zip(options.sites, before.tolist(), strict=True)]
        measured = again(program, _requests(options), settings.own, context, plan)
        cost = torch.full_like(cost, float("nan"))
        for row, site in enumerate(options.sites):
            cost[row, options.allowed[row]] = measured[site.name]
        found = _allocate(cost, options, settings, budget)
        told.append({"cost": found.cost, "changed": int((found.choice != before).sum())})
    return found, cost, told


def _price(
    cost: Tensor, options: Options, settings: Settings, budget: float | None, found: Allocation
) -> dict[str, Any]:
    """What the target's groups cost: the same costs solved without them, and the bits that both plans use."""
    free = replace(options, groups=group_numbers([site.name for site in options.sites], settings.groups))
    unbound = _allocate(cost, free, settings, budget)

    def used(allocation: Allocation) -> float:
        return float(options.counted.gather(1, allocation.choice[:, None]).sum()) * 8 / options.weights

    told = {"cost": found.cost, "free_cost": unbound.cost, "bits": used(found), "free_bits": used(unbound)}
    given = {} if budget is None else {"budget": budget * 8 / options.weights}
    return {"name": settings.target, **told, **given}


def _plan(
    program: Program,
    division: Division,
    options: Options,
    settings: Settings,
    solved: tuple[Tensor, Tensor | None, Allocation | None],
) -> Plan:
    choice, cost, found = solved
    entries = {}
    for row, site in enumerate(options.sites):
        column = int(choice[row])
        why = "pinned" if site.name in division.chosen["pins"] else ""
        predicted = None if cost is None else float(cost[row, column])
        entries[site.name] = planned_entry(site, options.formats[column].name, settings.activations, predicted, why)
    reasons = division.kept | division.degenerate
    sites = {
        name: entries[name] if name in entries else kept_entry(program, site, reasons[name])
        for name, site in unique_sites(program).items()
    }
    bounds = (None, None, None) if found is None else (found.cost, *map(_number, (found.bound, found.gap)))
    return Plan(
        sites=sites,
        method=settings.method,
        budget=_budget_json(settings),
        cost=bounds[0],
        bound=bounds[1],
        gap=bounds[2],
        foretold=bounds[0] if settings.costed.row.in_nats else None,
    )


def _number(value: float) -> float | None:
    """What is not known, as JSON says it."""
    return None if math.isnan(value) else value


def _budget_json(settings: Settings) -> dict[str, float]:
    given = {"average_bits": settings.average_bits, "budget_bytes": settings.budget_bytes}
    return {key: value for key, value in given.items() if value is not None}


def planned_entry(site: Site, format_name: str, activation: str, cost: float | None, why: str) -> PlanEntry:
    """The entry of a site that is rounded to a format."""
    return PlanEntry(
        format=format_name,
        activation=None if activation == "none" else parse(activation).name,
        category=site.category,
        numel=site.numel,
        bytes=parse(format_name).num_bytes(site.shape),
        alpha=site.get("alpha"),
        error=site.get("error", {}).get(format_name),
        cost=cost,
        why=why,
    )


def kept_entry(program: Program, site: Site, why: str) -> PlanEntry:
    """The entry of a site that stays as it is."""
    size = site.numel * program.weights.specs[site.weight].dtype.itemsize
    return PlanEntry(
        format=None, category=site.category, numel=site.numel, bytes=size, alpha=site.get("alpha"), why=why
    )


def _manual(program: Program, division: Division, settings: Settings) -> Plan:
    """What the file says, except for sites that `keep` names."""
    sites = unique_sites(program)
    schemes, warnings = read_manual(settings.plan, list(sites))
    entries = {}
    for name, site in sites.items():
        scheme = Scheme(None, None, division.kept[name]) if name in division.kept else schemes[name]
        if scheme.format is None:
            entries[name] = kept_entry(program, site, scheme.why)
        else:
            entries[name] = planned_entry(site, scheme.format, scheme.activation or "none", None, scheme.why)
    return Plan(sites=entries, method="manual", warnings=warnings)
