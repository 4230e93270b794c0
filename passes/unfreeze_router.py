"""`unfreeze_router`: say which weights `finetune_router` may train."""

from dataclasses import dataclass

from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Pass, register


@register("unfreeze_router")
@dataclass(frozen=True, kw_only=True)
class UnfreezeRouter(Pass):
    """Mark routers as trainable; everything else stays as it is, byte for byte.

    Fields:
        shared_expert_gate: also train the gate of a shared expert (Qwen2-MoE).
    """

    stage = "train"

    shared_expert_gate: bool = False

    def find(self, program: Program) -> list[Site]:
        """Routers, by their role and never by a part of their name: `gate_proj` is no router."""
        return [site for site in program.sites() if site.category in ("router", "shared_expert_gate")]

    def refuse(self, program: Program, site: Site) -> str | None:
        """A router that the plan quantized has no weights left to train."""
        if site.category == "shared_expert_gate" and not self.shared_expert_gate:
            return "it is the gate of a shared expert, which trains only with `shared_expert_gate: true`"
        if site.get("format") is not None:
            return f"the plan gives it the format {site.get('format')}; keep `router` in `assign_plan` to train it"
        return None

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Remember the names."""
        names = [site.weight for site in sites]
        program.trainable = list(dict.fromkeys([*program.trainable, *names]))
        return Changes(changed=[site.name for site in sites], details={"parameters": sum(s.numel for s in sites)})
