"""`quantize`: round every planned site to the nearest codes of its format."""

from dataclasses import dataclass

from aqtx.errors import InputError
from aqtx.formats import quantize
from aqtx.program.outer_scale import largest_under_one_scale
from aqtx.program.program import Program
from aqtx.program.site import Site
from aqtx.registry import Changes, Context, Pass, register
from aqtx.rotation.select import check_planned


@register("quantize")
@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Round to nearest, in the format of the plan; needs no data."""

    stage = "round"
    matrix_copies = 3
    requires = ("assign_plan",)

    def find(self, program: Program) -> list[Site]:
        """Sites that the plan gives a packed format."""
        return [site for site in program.sites() if site.is_to_round]

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """One matrix at a time, so that memory holds one and the codes; a changed weight is rounded from float32."""
        check_planned(program)
        every = {site.name: site for site in program.sites()}
        for site in context.progress(sites, description="quantize"):
            try:
                largest = largest_under_one_scale(program, site, every)
                rounded = quantize(program.read(site), site.get("format"), largest=largest)
                program.codes[site.name] = rounded.to(program.dtype)
            except InputError as error:
                raise InputError(*(f"{site.name}: {problem}" for problem in error.problems)) from error
        return Changes(changed=[site.name for site in sites])
