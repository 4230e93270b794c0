"""What one plan for all costs each domain of the text, measured: divergence over that of the domain's own plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aqtx.errors import InputError
from aqtx.evaluate.perplexity import DocumentScores
from aqtx.numerics.intervals import bootstrap_ratio
from aqtx.planning.decide import decide, own_plans
from aqtx.planning.settings import Settings
from aqtx.program.program import Program
from aqtx.registry import Context

Score = Callable[[Mapping[str, str | None], str], DocumentScores]  # (formats by site, name) -> divergences


def settings_of(base: Settings, bits: float) -> dict[str, Settings]:
    """The two objectives at a budget."""
    fisher = replace(base, method="fisher", average_bits=bits, budget_bytes=None, plan=None, rotate="none")
    return {name: replace(fisher, objective=name) for name in ("mean", "worst_domain")}


def measure_regrets(
    program: Program, base: Settings, budgets: Sequence[float], context: Context, score: Score
) -> list[dict[str, Any]]:
    """A row for each budget, objective and domain: divergence, that of the domain's own plan, and their ratio.

    Raises:
        InputError: the calibration text has one domain, or none that the evaluation text has.
    """
    rows = []
    for bits in budgets:
        asked = settings_of(base, bits)
        own = own_plans(program, asked["mean"], context)
        if not own:
            raise InputError("study.domains: the calibration text has one domain; there is nothing to compare")
        plans = {name: decide(program, settings, context).plan for name, settings in asked.items()}
        found = {
            name: score({site: entry.format for site, entry in plan.sites.items()}, f"{name}-{bits:g}")
            for name, plan in plans.items()
        }
        domains = [domain for domain in own if domain in next(iter(found.values())).domains]
        if not domains:
            raise InputError(
                f"study.domains: the evaluation text has no document of the domains {', '.join(own)}; its own are "
                f"{', '.join(dict.fromkeys(next(iter(found.values())).domains))}"
            )
        for domain in domains:
            alone = score(own[domain], f"{domain}-{bits:g}").of(domain)
            rows += [
                _row((bits, name, domain), scores.of(domain), alone, plans[name].domains[domain]["regret"])
                for name, scores in found.items()
            ]
    return rows


def _row(
    place: tuple[float, str, str], scores: DocumentScores, alone: DocumentScores, predicted: float
) -> dict[str, Any]:
    bits, objective, domain = place
    return {
        "budget_bits": bits,
        "objective": objective,
        "domain": domain,
        "divergence": bootstrap_ratio(scores.nll, scores.num_tokens).to_json(),
        "own": bootstrap_ratio(alone.nll, alone.num_tokens).to_json(),
        "regret": bootstrap_ratio(scores.nll, alone.nll).to_json(),
        "predicted": predicted,
    }
