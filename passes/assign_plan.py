"""`assign_plan`: a format for each site, under a budget."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from aqtx.errors import problems_of
from aqtx.passes.insert_hadamard import InsertHadamard
from aqtx.planning.decide import decide
from aqtx.planning.manual import read_manual
from aqtx.planning.options import DEGENERATE, how_to_annotate, unmet
from aqtx.planning.settings import Settings
from aqtx.planning.target import refused, share_scales
from aqtx.program.edits import QuantizeActivation
from aqtx.program.plan import Plan
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Pass, Refusal, Walks, register
from aqtx.sensitivity.selection import unique_sites


@register("assign_plan")
@dataclass(frozen=True, kw_only=True)
class AssignPlan(Settings, Pass):
    """Decide the format of every site: the least predicted loss within the budget, or by a rule.

    site{alpha, error} -> site{format: mxfp4, activation: null, why: ""}
    a kept site        -> site{format: null, why: "kept by 'router'"}

    x -> linear  becomes  x -> quantize_activation -> linear, where the plan has activations.

    Fields: those of `aqtx.planning.settings.Settings`.
    """

    stage = "plan"

    def validate(self) -> list[str]:
        """Problems of the fields."""
        return self.problems()

    def walks(self) -> tuple[Walks, int | None]:
        """As its method does."""
        return self.row.walks(self.own)

    def misfits(self, program: Program) -> list[str]:
        """A target that takes no such model, selectors without a match, a manual plan that does not fit, codes."""
        problems = [f"target {self.target}: {told}" for told in refused(self.target, program.config)]
        problems += unmet(program, self)
        if coded := program.config.get("quantization_config", {}).get("formats"):
            first, fmt = next(iter(coded.items()))
            problems.append(f"{len(coded)} sites are quantized already, first {first} ({fmt}): give the original model")
        if self.method == "manual":
            problems += problems_of(lambda: read_manual(self.plan, list(unique_sites(program))))
        return problems

    def misplaced(self, before: Sequence[Pass], after: Sequence[Pass]) -> list[str]:
        """Annotations that no pass before it makes; rotations that no pass carries out before rounding."""
        made = {name for step in before for name in step.annotates}
        problems = [
            f"method {self.method} needs {need}: {how_to_annotate(need)}" for need in self.needs if need not in made
        ]
        between = list(takewhile(lambda step: step.stage != "round", after))
        turned = any(isinstance(step, InsertHadamard) and "plan" in step.before for step in between)
        if self.rotate == "auto" and not turned:
            problems.append(
                "rotate auto: add `- insert_hadamard: {before: [plan]}` after `assign_plan`, before rounding"
            )
        return problems

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Plan, then annotate all sites."""
        decision = decide(program, self, context)
        plan = decision.plan
        for warning in plan.warnings:
            warnings.warn(warning, stacklevel=2)
        program.plan = plan
        for site in sites:
            entry = plan.sites[site.name]
            for key, value in (("format", entry.format), ("activation", entry.activation), ("why", entry.why)):
                site.set(key, value)
            site.set("rotation", None if entry.rotation is None else {"block": entry.rotation})
        share_scales(self.target, sites)
        program.edit(*activation_edits(program))
        refused = [Refusal(name, entry.why) for name, entry in plan.sites.items() if entry.why.startswith(DEGENERATE)]
        return Changes(changed=list(plan.planned), refused=refused, details={**_details(plan), **decision.details})


def activation_edits(program: Program) -> list[QuantizeActivation]:
    """The nodes that quantize activations: one edit for each weight with a planned input format.

    Experts of one stack may differ; one that is not planned reads its input as it is.
    """
    edits = []
    for weight, sites in program.sites_by_weight().items():
        formats = tuple(site.get("activation") or "" for site in sites)
        if any(formats):
            edits.append(QuantizeActivation(weight=weight, formats=formats))
    return edits


def _details(plan: Plan) -> dict[str, object]:
    facts = {"method": plan.method, "budget": plan.budget, "average_bits": plan.average_bits}
    return {**facts, "cost": plan.cost, "bound": plan.bound, "gap": plan.gap, "warnings": plan.warnings}
