"""What may be decided: the sites, the formats each may take, their bytes, and the limit on the bytes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from aqtx.errors import InputError
from aqtx.formats.table import Format, parse
from aqtx.numerics.allocate import least_size
from aqtx.planning.groups import group_numbers
from aqtx.planning.settings import Settings
from aqtx.program.accounting import kept_bytes
from aqtx.program.program import Program
from aqtx.program.roles import select
from aqtx.program.site import Site
from aqtx.sensitivity.selection import unique_sites

_ALPHA_METHODS = ("alpha", "alphaq", "ratio", "threshold")
DEGENERATE = "its alpha is degenerate"
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Options:
    """The decision to take. Tables are [sites, formats]."""

    sites: list[Site]
    formats: list[Format]
    size: Tensor  # stored bytes
    allowed: Tensor  # bool
    groups: list[int]
    share: Tensor  # [sites] share of the tokens that read a site; 1 under the storage cost model

    @property
    def numel(self) -> Tensor:
        """Weights of each site."""
        return torch.tensor([site.numel for site in self.sites], dtype=torch.float64)


@dataclass(frozen=True)
class Division:
    """The sites to decide; those that stay with the reason; those that stay because alpha says nothing there."""

    planned: list[Site]
    kept: dict[str, str]
    degenerate: dict[str, str]
    chosen: dict[str, dict[str, str]]  # field -> site -> the selector that chose it


def divide(program: Program, settings: Settings) -> Division:
    """Which sites are decided."""
    sites, chosen = unique_sites(program), choose(program, settings)
    kept = {name: f"kept by {by!r}" for name, by in chosen["keep"].items() if name not in chosen["pins"]}
    rest = [site for name, site in sites.items() if name not in kept]
    method = settings.base if settings.method == "search" else settings.method
    degenerate = _degenerate(rest) if method in _ALPHA_METHODS else {}
    return Division([site for site in rest if site.name not in degenerate], kept, degenerate, chosen)


def choose(program: Program, settings: Settings) -> dict[str, dict[str, str]]:
    """{field: {site: selector}} of the fields that select sites; patterns that match nothing are named in one error."""
    sites = unique_sites(program)
    selectors = {"keep": settings.kept_selectors, "pins": tuple(settings.pins)}
    selectors |= {"min_bits": tuple(settings.min_bits), "max_bits": tuple(settings.max_bits)}
    chosen: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for key, patterns in selectors.items():
        try:
            chosen[key] = select(sites, patterns, key)
        except InputError as error:
            problems.extend(error.problems)
    if problems:
        raise InputError(*problems)
    return chosen


def _degenerate(sites: list[Site]) -> dict[str, str]:
    """Sites without an alpha to go by: they are never sorted among the others."""
    missing = [site.name for site in sites if site.get("alpha_info") is None]
    if missing:
        raise InputError(
            f"{len(missing)} sites have no alpha, first {missing[0]!r}: add `- annotate_alpha` before `assign_plan`"
        )
    return {
        site.name: f"{DEGENERATE}: {site.get('alpha_info')['reason']}" for site in sites if site.get("alpha") is None
    }


def build_options(program: Program, division: Division, settings: Settings) -> Options:
    """Sizes and constraints of the planned sites."""
    sites, formats = division.planned, settings.formats
    size = torch.tensor([[fmt.num_bytes(site.shape) for fmt in formats] for site in sites], dtype=torch.float64)
    share = torch.tensor([_share(program, site, settings) for site in sites], dtype=torch.float64)
    groups = group_numbers([site.name for site in sites], settings.groups)
    allowed = _allowed(division, formats, settings)
    return Options(sites, formats, size.reshape(len(sites), len(formats)), allowed, groups, share)


def _share(program: Program, site: Site, settings: Settings) -> float:
    """The share of the tokens that reach a site's expert, were the load even."""
    if settings.cost_model == "storage" or site.expert is None:
        return 1.0
    total = next((program.config[key] for key in _EXPERT_COUNTS if key in program.config), site.slots)
    return float(program.config.get("num_experts_per_tok", total)) / float(total)


def _allowed(division: Division, formats: list[Format], settings: Settings) -> Tensor:
    """Which formats each planned site may take: a pin leaves one, limits leave those between them."""
    bits = [fmt.element.bits for fmt in formats]
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
        rows.append([i < settings.num_candidates and least <= bits[i] <= most for i in range(len(formats))])
        if not any(rows[-1]):
            empty.append(name)
    if empty:
        raise InputError(f"{empty[0]}: min_bits and max_bits leave none of the candidates ({len(empty)} such sites)")
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(formats))


def limit(program: Program, options: Options, settings: Settings) -> float | None:
    """The bytes that the planned sites may take, None without a budget; InputError where none of the plans fits.

    Under the `active` cost model bytes count by the share of tokens that read them.
    """
    size = options.size * options.share[:, None]
    least = least_size(size, options.allowed, options.groups)
    weights = float((options.numel * options.share).sum())
    if settings.average_bits is not None:
        budget = settings.average_bits * weights / 8
        if budget < least:
            raise InputError(
                f"average_bits {settings.average_bits:g} is below the smallest possible, {least * 8 / weights:.4f} "
                f"(of {', '.join(fmt.name for fmt in options.formats)})"
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
