"""What the program that a plan is meant for allows: the rows of `checkpoint/exports`, as constraints of a plan."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aqtx.checkpoint.exports.clients import CLIENTS
from aqtx.checkpoint.exports.run import no_form
from aqtx.checkpoint.exports.table import TARGETS
from aqtx.checkpoint.exports.target import Matrix, captured
from aqtx.formats.table import NVFP4_SCALE, Format, parse
from aqtx.program.site import Site

FREE = "aqtx"  # this project's own folder, which holds every plan


def fused_by(target: str) -> tuple[str, ...]:
    """Expressions whose equal captures make sites share one format."""
    return () if target == FREE else CLIENTS[target].alike


def refused(target: str, config: Mapping[str, Any]) -> list[str]:
    """What stands against any export of a model to the target."""
    return [] if target == FREE else TARGETS[CLIENTS[target].target].refuses(config)


def missing(target: str, config: Mapping[str, Any], folder: Path | None) -> list[str]:
    """What an export to the target will have to be given."""
    return [] if target == FREE else TARGETS[CLIENTS[target].target].missing(config, folder)


def why_not(target: str, fmt: Format, site: Site, config: Mapping[str, Any]) -> str | None:
    """Why a site cannot be of a format at the target; "" where it has no form there; None where it can."""
    if target == FREE or not fmt.is_packed:
        return None
    client = CLIENTS[target]
    if TARGETS[client.target].form(fmt, site.shape[1]) is None:
        return ""
    return client.refuses(fmt, Matrix(site.name, site.shape[1], config))


def share_scales(target: str, sites: Sequence[Site]) -> None:
    """Annotate NVFP4 sites that the target fuses under one outer scale with each other's names."""
    if target == FREE:
        return
    coded = {site.name: site for site in sites if site.is_to_round and parse(site.get("format")).scale is NVFP4_SCALE}
    for pattern in CLIENTS[target].shared_scale:
        for members in captured(pattern, coded).values():
            for name in members:
                coded[name].set("outer_scale", members)


def bits(target: str, fmt: Format, site: Site) -> float:
    """Bits per weight in what the target loads, which may be more than the format's own."""
    own = fmt.bits(site.shape)
    if target == FREE or not fmt.is_packed:
        return own
    counted = TARGETS[CLIENTS[target].target].bits
    return own if counted is None else counted(fmt, site.shape[1]) or own


def forbidden(target: str, formats: Sequence[Format], sites: Sequence[Site], config: Mapping[str, Any]) -> list[str]:
    """A sentence for each candidate that no site may take, with the nearest format that they may."""
    problems = []
    for fmt in formats:
        reasons = [why_not(target, fmt, site, config) for site in sites]
        if not sites or None in reasons:
            continue
        first = sites[0]

        def runs(other: Format, first: Site = first) -> bool:
            return why_not(target, other, first, config) is None

        names = [site.name for site in sites]
        problems.append(no_form(f"target {target}", fmt, names, first.shape[1], runs, reasons[0] or ""))
    return problems


def half_kept(target: str, planned: Sequence[Site], all_sites: Sequence[str]) -> list[str]:
    """Sentences for groups of which some sites are planned and others kept, and for what must not be kept."""
    if target == FREE:
        return []
    chosen = {site.name for site in planned}
    return CLIENTS[target].unlike({name: "planned" if name in chosen else None for name in all_sites})
