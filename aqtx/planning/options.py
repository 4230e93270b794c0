"""What may be decided: the sites, the formats each may take, their bytes, and the limit on the bytes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aqtx.errors import InputError, problems_of
from aqtx.formats.table import Format, parse
from aqtx.numerics.allocate import least_size
from aqtx.planning.groups import group_numbers
from aqtx.planning.method import Method
from aqtx.planning.question import Options
from aqtx.planning.settings import Settings
from aqtx.planning.target import bits, forbidden, fused_by, half_kept, why_not
from aqtx.program.accounting import chosen_experts, kept_bytes
from aqtx.program.program import Program
from aqtx.program.roles import select
from aqtx.program.site import Site
from aqtx.registry import annotator
from aqtx.sensitivity.selection import unique_sites

DEGENERATE = "its alpha is degenerate"


@dataclass(frozen=True)
class Division:
    """The sites to decide; those that stay with the reason; those that stay because alpha says nothing there."""

    planned: list[Site]
    kept: dict[str, str]
    degenerate: dict[str, str]
    chosen: dict[str, dict[str, str]]  # field -> site -> the selector that chose it


def divide(program: Program, settings: Settings, *, measured: bool = True) -> Division:
    """Which sites are decided. Where nothing is `measured` yet, none is left out for what it was found to be.

    Raises:
        InputError: selectors match nothing, or an earlier pass has not annotated what the method needs.
    """
    sites, chosen = unique_sites(program), choose(program, settings)
    kept = {name: f"kept by {by!r}" for name, by in chosen["keep"].items() if name not in chosen["pins"]}
    rest = [site for name, site in sites.items() if name not in kept]
    degenerate = _degenerate(rest, settings.needs) if measured else {}
    planned = [site for site in rest if site.name not in degenerate]
    if measured:
        _require(planned, settings.needs)
    return Division(planned, kept, degenerate, chosen)


def choose(program: Program, settings: Settings) -> dict[str, dict[str, str]]:
    """{field: {site: selector}} of the fields that select sites; patterns that match nothing are named in one error."""
    sites = unique_sites(program)
    selectors = {"keep": settings.kept_selectors, "pins": tuple(settings.pins)}
    selectors |= {"min_bits": tuple(settings.min_bits), "max_bits": tuple(settings.max_bits)}
    roles = {name: site.category for name, site in sites.items()}
    chosen: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for key, patterns in selectors.items():
        try:
            chosen[key] = select(roles, patterns, key)
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(*problems)
    return chosen


def _degenerate(sites: list[Site], needs: tuple[str, ...]) -> dict[str, str]:
    """Sites without an alpha to go by: they are never sorted among the others."""
    if "alpha" not in needs:
        return {}
    without = [(site, site.get("alpha_info")) for site in sites if site.get("alpha") is None]
    return {site.name: f"{DEGENERATE}: {info['reason']}" for site, info in without if info is not None}


def _require(sites: list[Site], needs: tuple[str, ...]) -> None:
    for need in needs:
        missing = [site.name for site in sites if site.get(need) is None]
        if missing:
            raise InputError(f"{len(missing)} sites have no {need}, first {missing[0]!r}: {how_to_annotate(need)}")


def how_to_annotate(need: str) -> str:
    """What to add to a recipe, so that sites have an annotation."""
    made_by = annotator(need)
    return f"add `- {made_by.name}` before `assign_plan`" if made_by else f"no pass makes the annotation {need}"


def build_options(program: Program, division: Division, settings: Settings) -> Options:
    """Sizes and constraints of the planned sites."""
    sites, formats = division.planned, settings.formats
    size = torch.tensor([[fmt.num_bytes(site.shape) for fmt in formats] for site in sites], dtype=torch.float64)
    size = size.reshape(len(sites), len(formats))
    if settings.row.nominal:
        counted = torch.tensor([float(fmt.element.bits) for fmt in formats], dtype=torch.float64).repeat(len(sites), 1)
        weights = 8.0 * len(sites)
    else:
        share = torch.tensor([_share(program, site, settings) for site in sites], dtype=torch.float64)
        loaded = [[bits(settings.target, fmt, site) * site.numel / 8 for fmt in formats] for site in sites]
        counted = torch.tensor(loaded, dtype=torch.float64).reshape(size.shape) * share[:, None]
        weights = float((torch.tensor([site.numel for site in sites], dtype=torch.float64) * share).sum())
    groups = group_numbers([site.name for site in sites], settings.groups, fused_by(settings.target))
    problems = [
        *forbidden(settings.target, formats, sites, program.config),
        *half_kept(settings.target, sites, list(unique_sites(program))),
    ]
    if problems:
        raise InputError(*problems)
    allowed = _allowed(program, division, formats, settings)
    options = Options(sites, formats, settings.num_candidates, size, allowed, groups, counted, weights)
    _check_groups(options)
    return options


def _check_groups(options: Options) -> None:
    """Refuse pins and limits that leave the sites of a group no format in common."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(options.groups):
        members.setdefault(group, []).append(row)
    torn = [rows for rows in members.values() if not bool(options.allowed[rows].all(0).any())]
    if torn:
        first, last = options.sites[torn[0][0]].name, options.sites[torn[0][-1]].name
        raise InputError(
            f"groups: pins, min_bits and max_bits leave {first} and {last} no common format ({len(torn)} such groups)"
        )


def _share(program: Program, site: Site, settings: Settings) -> float:
    """The share of the tokens that reach a site's expert, were the load even."""
    if settings.cost_model == "storage" or site.expert is None:
        return 1.0
    return (chosen_experts(program) or site.slots) / site.slots


def _allowed(program: Program, division: Division, formats: list[Format], settings: Settings) -> Tensor:
    """Which formats each planned site may take: a pin leaves one, limits leave those between them."""
    widths = [fmt.element.bits for fmt in formats]
    index = {fmt.name: i for i, fmt in enumerate(formats)}
    chosen, rows, empty = division.chosen, [], []
    for site in division.planned:
        name = site.name
        if name in chosen["pins"]:
            pinned = index[parse(settings.pins[chosen["pins"][name]]).name]
            rows.append([i == pinned for i in range(len(formats))])
            continue
        least = settings.min_bits.get(chosen["min_bits"].get(name, ""), 0.0)
        most = settings.max_bits.get(chosen["max_bits"].get(name, ""), 16.0)
        runs = [why_not(settings.target, fmt, site, program.config) is None for fmt in formats]
        rows.append(
            [i < settings.num_candidates and least <= widths[i] <= most and runs[i] for i in range(len(formats))]
        )
        if not any(rows[-1]):
            empty.append(name)
    if empty:
        raise InputError(
            f"{empty[0]}: min_bits, max_bits and target leave none of the candidates ({len(empty)} such sites)"
        )
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(formats))


def limit(program: Program, options: Options, settings: Settings) -> float | None:
    """The bytes, as the budget counts them, that the planned sites may take; None without a budget.

    Raises:
        InputError: even the smallest plan is above it.
    """
    least = least_size(options.counted, options.allowed, options.groups)
    if settings.average_bits is not None:
        budget = settings.average_bits * options.weights / 8
        if budget < least:
            raise InputError(
                f"average_bits {settings.average_bits:g} is below the smallest possible, "
                f"{least * 8 / options.weights:.4f} (of {', '.join(fmt.name for fmt in options.formats)})"
            )
        return budget
    if settings.budget_bytes is None:
        return None
    kept = kept_bytes(program, options.sites)
    if settings.budget_bytes < kept + least:
        raise InputError(
            f"budget_bytes {settings.budget_bytes:,} is below the smallest possible, {kept + least:,.0f}: "
            f"{kept:,} for what is kept and {least:,.0f} for the planned sites"
        )
    return settings.budget_bytes - kept


def unmet(program: Program, settings: Settings) -> list[str]:
    """What a model's shapes alone say against settings: selectors, limits and budgets; reads no weight."""
    found: list[Options] = []
    problems = problems_of(lambda: found.append(_options_unmeasured(program, settings)))
    if problems or settings.row.name == "manual" or not found[0].sites:
        return problems
    options = found[0]
    problems = problems_of(lambda: limit(program, options, settings))
    problems += [problem for row in settings.rows for problem in _of_method(row, options.sites, settings)]
    most = largest_size(options) * 8 / options.weights
    if settings.average_bits is not None and settings.average_bits > most * (1 + 1e-9):
        problems.append(
            f"average_bits {settings.average_bits:g} is above the largest possible, {most:.4f} "
            f"(of {', '.join(fmt.name for fmt in options.formats)})"
        )
    return problems


def _of_method(row: Method, sites: list[Site], settings: Settings) -> list[str]:
    """What a method says against the sites."""
    if row.problems is None:
        return []
    try:
        return row.problems(sites, replace(settings, method=row.name).own)
    except InputError as error:
        return error.problems


def _options_unmeasured(program: Program, settings: Settings) -> Options:
    return build_options(program, divide(program, settings, measured=False), settings)


def largest_size(options: Options) -> float:
    """Counted bytes of the largest plan; sites of a group need not agree in it."""
    return float(torch.where(options.allowed, options.counted, 0.0).max(1).values.sum())
