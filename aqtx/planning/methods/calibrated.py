"""`calibrated`: exp(a + b z_l) e_lf, a and b fitted per role to what was measured (`aqtx.sensitivity.calibrated`)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aqtx.formats import Format
from aqtx.planning.method import Method, Own, register
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Context, Walks
from aqtx.sensitivity.calibrated import alpha_variants, annotate_fit, fit, log_ratio
from aqtx.sensitivity.fisher import KEYS, measure_fisher
from aqtx.sensitivity.measured import Request, error_table, smallest, values
from aqtx.sensitivity.trial import measure_trials


def walks(own: Own) -> tuple[Walks, int | None]:
    """As what it is fitted to is measured."""
    return ("backward", own["fisher_sequences"]) if own["fit_to"] == "fisher" else ("trials", own["trial_sequences"])


def measure(program: Program, wanted: Sequence[Request], own: Own, context: Context, seed: int) -> dict[str, Any]:
    """Measure, fit alpha to it, annotate; the details tell the fit."""
    sites = [site for site, _ in wanted]
    if own["fit_to"] == "fisher":
        count, key = own["fisher_sequences"], KEYS[own["fisher_detail"]]
        measure_fisher(program, smallest(wanted), context, num_sequences=count, detail=own["fisher_detail"])
    else:
        sample, key = smallest(_sample(wanted, own["num_trials"], seed)), "trial_loss"
        measure_trials(program, sample, context, measure="loss", num_sequences=own["trial_sequences"])
    targets = torch.tensor([_target(site, key) for site in sites], dtype=torch.float64)
    scores = alpha_variants(program, sites)
    found = fit(scores, targets, [site.category for site in sites])
    annotate_fit(found, scores[found.variant], sites)
    return {"calibrated": {**found.to_json(), "fit_to": own["fit_to"]}}


def cost(sites: Sequence[Site], formats: Sequence[Format], own: Own, seed: int) -> Tensor:
    """Squared errors times the sensitivity that the fit says."""
    return values(sites, "calibrated").exp()[:, None] * error_table(sites, formats)


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


register(
    Method(
        name="calibrated",
        summary="squared error weighted by alpha as fitted to this model",
        options=("fit_to", "num_trials", "trial_sequences", "fisher_sequences", "fisher_detail", "seed"),
        needs_text=True,
        walks=lambda own: (
            ("backward", own["fisher_sequences"]) if own["fit_to"] == "fisher" else ("trials", own["trial_sequences"])
        ),
        measure=measure,
        cost=cost,
        arms={"calibrated": {}},
    )
)
