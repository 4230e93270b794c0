"""`annotate_fisher`: errors weighted by gradients on calibration text."""

from dataclasses import dataclass
from typing import Literal

from aqtx.formats import parse
from aqtx.program import Program, Site
from aqtx.registry import Changes, Context, Pass, register
from aqtx.sensitivity.fisher import KEYS, measure_fisher
from aqtx.sensitivity.measured import requests
from aqtx.sensitivity.selection import format_problems, selected_sites


@register("annotate_fisher")
@dataclass(frozen=True, kw_only=True)
class AnnotateFisher(Pass):
    """Annotate every matrix with the loss that Fisher information predicts for each format, in nats per token.

    One backward pass per sequence; the whole model is resident.

    site -> site{fisher: {mxfp4: 1.2e-05, ...}}

    Fields:
        formats: the formats to try.
        sites: category names or patterns of the matrices to look at.
        num_sequences: calibration sequences to take gradients of.
        detail: `element` keeps the information of every weight (four bytes each), `matrix` one mean per matrix.
    """

    formats: tuple[str, ...] = ("mxfp4", "mxfp6", "mxfp8")
    sites: tuple[str, ...] = ("*",)
    num_sequences: int = 32
    detail: Literal["element", "matrix"] = "element"

    def validate(self) -> list[str]:
        """The format names and the count."""
        few = ["num_sequences is below 1."] if self.num_sequences < 1 else []
        return format_problems(self.formats, "formats") + few

    def find(self, program: Program) -> list[Site]:
        """The selected sites; one that is used twice is looked at once."""
        return selected_sites(program, self.sites, "sites")

    def apply(self, program: Program, sites: list[Site], context: Context) -> Changes:
        """Measure; the values go into the details by site."""
        wanted = requests(sites, [parse(name) for name in self.formats])
        per_matrix = self.detail == "matrix"
        measure_fisher(program, wanted, context, num_sequences=self.num_sequences, per_matrix=per_matrix)
        details = {"sites": [{"site": site.name, "fisher": site.get(KEYS[self.detail])} for site in sites]}
        return Changes(changed=[site.name for site in sites], details=details)
