"""`annotate_hessian`: errors weighted by how strong the inputs are, and how often experts are asked."""

from dataclasses import dataclass

from aqtx.formats import parse
from aqtx.program import Program, Site
from aqtx.registry import Changes, Context, Pass, register
from aqtx.sensitivity.inputs import measure_inputs
from aqtx.sensitivity.measured import requests
from aqtx.sensitivity.selection import format_problems, selected_sites


@register("annotate_hessian")
@dataclass(frozen=True, kw_only=True)
class AnnotateHessian(Pass):
    """Annotate every matrix with what calibration text says of its inputs.

    The error of each format is weighted by the mean square of each input channel; experts get their frequency and
    their summed gate scores. One block is resident at a time.

    site -> site{hessian: {mxfp4: 0.52, ...}, frequency: 0.25, gate_weight: 0.06}

    Fields:
        formats: the formats to try.
        sites: category names or patterns of the matrices to look at.
    """

    formats: tuple[str, ...] = ("mxfp4", "mxfp6", "mxfp8")
    sites: tuple[str, ...] = ("*",)

    def validate(self) -> list[str]:
        """The format names."""
        return format_problems(self.formats, "formats")

    def find(self, program: Program) -> list[Site]:
        """The selected sites; one that is used twice is looked at once."""
        return selected_sites(program, self.sites, "sites")

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Measure; the values go into the details by site."""
        wanted = requests(sites, [parse(name) for name in self.formats])
        measure_inputs(program, wanted, context)
        details = {
            "sites": [
                {"site": site.name, **{key: site.get(key) for key in ("hessian", "frequency", "gate_weight")}}
                for site in sites
            ]
        }
        return Changes(changed=[site.name for site in sites], details=details)
