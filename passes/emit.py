"""`emit`: wrap codes and scales in tensor subclasses that the graph computes with."""

from dataclasses import dataclass

from aqtx.errors import InputError
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Pass, register


@register("emit")
@dataclass(frozen=True, kw_only=True)
class Emit(Pass):
    """Replace every rounded weight by its packed tensor subclass.

    linear(x, W)  ->  linear(x, QuantizedTensor)      grouped_linear(x, W, o)  ->  (x, MixedExperts, o)

    The graph does not change; the subclass decides how it is computed with.
    """

    stage = "emit"

    def find(self, program: Program) -> list[Site]:
        """Sites that the plan gives a packed format."""
        return [site for site in program.sites() if site.is_to_round]

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Switch the program to packed parameters; refuses while a planned site has no codes."""
        unrounded = [site for site in sites if site.name not in program.codes]
        if unrounded:
            site = unrounded[0]
            raise InputError(
                f"{len(unrounded)} planned sites have no codes yet, first {site.name} ({site.get('format')}): "
                "add `quantize` or `gptq` before `emit`"
            )
        program.emitted = True
        return Changes(changed=[site.name for site in sites])
