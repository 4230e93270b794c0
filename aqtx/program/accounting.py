"""Counts of weights, bytes and bits: every weight is quantized, kept or refused, and they add up."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from aqtx.formats import parse
from aqtx.program.program import Program
from aqtx.program.site import Site

QUANTIZED, KEPT, REFUSED = "quantized", "kept", "refused"
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")  # as families spell it


def stored_bytes(program: Program) -> int:
    """Bytes of all tensors that a checkpoint of the program stores; no weight is read."""
    sites, specs, tied = program.sites_by_weight(), program.weights.specs, program.tied()
    return sum(
        sum(site_bytes(program, site) for site in sites[name]) if name in sites else spec.numel * spec.on_disk.itemsize
        for name, spec in specs.items()
        if name not in tied
    )


def site_bytes(program: Program, site: Site) -> int:
    """Bytes that a checkpoint stores for one matrix: by its codes' format, or in the dtype of its parameter."""
    loaded = program.config.get("quantization_config", {}).get("formats", {})
    name = program.codes.format_of(site.name) or loaded.get(site.name)
    if name is None:
        return site.numel * program.weights.specs[site.weight].on_disk.itemsize
    return parse(name).num_bytes(site.shape)


def original_bytes(program: Program) -> int:
    """Bytes of the model before any pass, in the dtype of its graphs; what its source holds more precisely, in that."""
    tied = program.weights.tied
    return sum(spec.numel * spec.on_disk.itemsize for name, spec in program.weights.specs.items() if name not in tied)


def chosen_experts(program: Program) -> int | None:
    """How many experts each token is given, None where the config does not tell."""
    found = (program.config.get(key) for key in _CHOSEN)
    return next((max(value, 1) for value in found if isinstance(value, int)), None)


def kept_bytes(program: Program, planned: Iterable[Site]) -> int:
    """Bytes of all stored tensors beside the planned sites: kept sites, embeddings, norms, biases."""
    specs, tied = program.weights.specs, program.tied()
    total = sum(spec.numel * spec.on_disk.itemsize for name, spec in specs.items() if name not in tied)
    return total - sum(site.numel * specs[site.weight].on_disk.itemsize for site in planned if site.weight not in tied)


@dataclass(frozen=True)
class Accounting:
    """What became of the weights, in elements and in matrices."""

    elements: dict[str, int]
    sites: dict[str, int]
    planned_bits: float | None  # over the sites that the plan decides; None where nothing is planned
    model_bits: float
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        """The keys of report.json."""
        return {
            "weights": self.elements,
            "sites": self.sites,
            "average_bits": self.planned_bits,
            "average_bits_model": self.model_bits,
        }


def account(program: Program, refused: Collection[str]) -> Accounting:
    """Count a finished program, of whose sites some were refused; sites that share a parameter count once."""
    tied = program.tied()
    fates = {site.name: _fate(program, site, refused) for site in _unique(program.sites()) if site.weight not in tied}
    members = {site.name: site for site in program.sites()}
    sites = {fate: sum(found == fate for found in fates.values()) for fate in (QUANTIZED, KEPT, REFUSED)}
    elements = {
        fate: sum(members[name].numel for name, found in fates.items() if found == fate)
        for fate in (QUANTIZED, KEPT, REFUSED)
    }
    total = sum(spec.numel for name, spec in program.weights.specs.items() if name not in tied)
    elements[KEPT] += total - sum(elements.values())  # embeddings, norms and biases are no sites, and are kept
    planned = [site for site in members.values() if site.get("format") is not None]
    after = stored_bytes(program)
    return Accounting(
        elements={"total": total, **elements},
        sites={"total": len(fates), **sites},
        planned_bits=_bits(program, planned),
        model_bits=after * 8 / total,
        bytes_after=after,
    )


def _unique(sites: list[Site]) -> list[Site]:
    return list({site.name: site for site in sites}.values())


def _fate(program: Program, site: Site, refused: Collection[str]) -> str:
    if site.name in program.codes:
        return QUANTIZED
    return REFUSED if site.name in refused else KEPT


def _bits(program: Program, planned: list[Site]) -> float | None:
    """Stored bits per weight over the planned sites."""
    if not planned:
        return None
    return sum(site_bytes(program, site) for site in planned) * 8 / sum(site.numel for site in planned)
